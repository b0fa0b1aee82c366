"""The same verbs on a cluster, and the command line. Ray only lives here."""
