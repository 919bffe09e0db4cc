"""What `helm test` runs: waits until the operator's leader answers and has read the distillations of the cluster."""

import sys
import time
import urllib.request

url, deadline = sys.argv[1], time.monotonic() + float(sys.argv[2] if len(sys.argv) > 2 else 120)
missing = "has not been asked"
while time.monotonic() < deadline:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError as error:
        missing = f"does not answer: {error}"
    else:
        # Behind the Service are all replicas; only the leader reads.
        leads = "opd_leader 1.0" in lines
        read = 'opd_api_requests_total{code="200",resource="opddistillations",verb="GET"}'
        if leads and any(line.startswith(read) for line in lines):
            print("the operator is at work:", next(line for line in lines if line.startswith("opd_build_info")))
            sys.exit()
        missing = "has not read the distillations yet" if leads else "has no leader yet"
    time.sleep(2)
sys.exit(f"{url} {missing}")
