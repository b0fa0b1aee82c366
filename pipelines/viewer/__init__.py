"""`sgcd serve`: the reports of a lake, and its scans in three dimensions, on this machine."""
