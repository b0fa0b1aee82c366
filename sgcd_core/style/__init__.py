"""Image style: histograms, the record, encoders."""
