#!/bin/sh
# Creates the bucket, and the user for gateway and workers. Another run only updates the user's secret.
set -eu

# Secrets go through pipes, because all users of a machine can read command lines.
printf '%s\n%s\n' "$MINIO_ROOT_USER" "$MINIO_ROOT_PASSWORD" | mc alias set fleet http://minio:9000
mc mb --ignore-existing "fleet/$BUCKET_NAME"
printf '%s\n%s\n' "$BUCKET_ACCESS_KEY_ID" "$BUCKET_SECRET_ACCESS_KEY" | mc admin user add fleet
case $(mc admin user info fleet "$BUCKET_ACCESS_KEY_ID") in
  *readwrite*) ;;
  *) mc admin policy attach fleet readwrite --user "$BUCKET_ACCESS_KEY_ID" ;;
esac
