#!/bin/sh
# Makes the bucket, and the user that gateway and workers use it as. Run again, it changes nothing but the user's secret.
set -eu

# Secrets go through pipes: every user of the machine can read the arguments of a program.
printf '%s\n%s\n' "$MINIO_ROOT_USER" "$MINIO_ROOT_PASSWORD" | mc alias set fleet http://minio:9000
mc mb --ignore-existing "fleet/$BUCKET_NAME"
printf '%s\n%s\n' "$BUCKET_ACCESS_KEY_ID" "$BUCKET_SECRET_ACCESS_KEY" | mc admin user add fleet
case $(mc admin user info fleet "$BUCKET_ACCESS_KEY_ID") in
  *readwrite*) ;;
  *) mc admin policy attach fleet readwrite --user "$BUCKET_ACCESS_KEY_ID" ;;
esac
