#!/bin/sh
# `docker run IMAGE harmonize …` runs `sgcd harmonize …`. The programs below run as they are, so
# that `ray up` and Kubernetes can start what they need.
set -eu
case "${1:-}" in
  ray | sgcd | mlflow | python | python3 | sh | bash | /*) exec "$@" ;;
  *) exec sgcd "$@" ;;
esac
