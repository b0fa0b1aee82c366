"""Reading and writing: one door to file:// and s3://, NIfTI, BIDS names."""
