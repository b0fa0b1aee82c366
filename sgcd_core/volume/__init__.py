"""Volumes: checks, preparation, the condition, the way back to the native grid."""
