#!/bin/sh
# `docker run IMAGE harmonize …` runs `sgcd harmonize …`. The programs below run as they are, so
# that `ray up` and Kubernetes can start what they need; so does a path, if it is a program's and
# not of a BIDS App's folder.
set -eu
case "${1:-}" in
  ray | sgcd | mlflow | python | python3 | sh | bash) exec "$@" ;;
  /*) if [ -f "$1" ] && [ -x "$1" ]; then exec "$@"; fi ;;
esac
exec sgcd "$@"
