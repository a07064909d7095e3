"""RunPod Serverless: the handler, its progress, and the loop that takes jobs."""
