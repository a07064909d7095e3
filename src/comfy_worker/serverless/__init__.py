"""RunPod Serverless: the async handler, its progress, and the loop that takes jobs."""
