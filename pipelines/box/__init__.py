"""The model in the box: trained once on digital scans of random scanners, shipped with the code."""
