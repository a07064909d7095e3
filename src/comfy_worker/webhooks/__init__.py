"""Webhooks: progress and the end of each job. A receiver cannot affect the job, whatever it does."""
