"""`python -m tests.support.gateway.event_publisher URL JOB COUNT` publishes a job's events through a Redis."""

from __future__ import annotations

import sys
from contextlib import closing

from comfy_worker.gateway.events.bus import PREVIEW, PROGRESS, STATUS
from comfy_worker.gateway.events.redis_bus import RedisEventBus

PICTURE = bytes(range(256))

if __name__ == "__main__":
    url, job_id, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with closing(RedisEventBus(url)) as bus:
        assert bus.has_subscribers(job_id), "who listens in another process counts too"
        for step in range(count):
            bus.publish(job_id, PROGRESS, {"step": step})
        bus.publish(job_id, PREVIEW, {"mime_type": "image/png", "node_id": None, "content": PICTURE})
        bus.publish(job_id, STATUS, {"status": "COMPLETED"})
