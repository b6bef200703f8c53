# mypy: ignore-errors
"""`submit.py ADMIN_FOLDER JOB_FOLDER`: hand a job in and wait for its end."""

import sys

from nvflare.fuel.flare_api.flare_api import new_secure_session

session = new_secure_session("admin@bench.com", sys.argv[1])
try:
    job = session.submit_job(sys.argv[2])
    print(session.monitor_job(job, timeout=900), session.get_job_meta(job).get("status"), flush=True)
finally:
    session.close()
