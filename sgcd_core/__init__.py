"""The method and the volume: no Ray, no MLflow, no table, no command line."""
