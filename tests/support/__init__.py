"""What the tests need around the worker: a stand-in RunPod platform, real processes and an S3 server."""
