"""Files to S3 and back with one client, each in the way that its own documentation shows, in whatever venv has it.

python run_s3_client.py job.json
{"client": "llmopt" | "obstore" | "obstore and sha256" | "boto3", "way": "up" | "down", "bucket": name,
 "objects": {key: file}, "at_once": n, "store": folder and "artifact": id (of llmopt alone)}

Prints seconds of the transfer, without imports and making the client, and CPU seconds of it and of the whole process.
The server is the one that the AWS environment names. What llmopt fetches is verified and synced, and then in its store;
the others' files are written and no more, or with sha256 also read through once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]


def llmopt(job: Job) -> Callable[[], object]:
    from llmopt.artifacts.remote import Remote, transfer
    from llmopt.artifacts.store import Store

    store, remote = Store(Path(job["store"])), Remote.open(f"s3://{job['bucket']}/store")
    if job["way"] == "up":
        return lambda: transfer.push(store, job["artifact"], remote)
    return lambda: transfer.pull(store, job["artifact"], remote)


def obstore(job: Job) -> Callable[[], object]:
    import obstore as client
    from obstore.store import S3Store

    store = S3Store(
        job["bucket"],
        config={"aws_endpoint_url_s3": os.environ["AWS_ENDPOINT_URL_S3"]},
        region=os.environ["AWS_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def up(key: str, file: str) -> None:
        client.put(store, key, Path(file))

    def down(key: str, file: str) -> None:
        with Path(file).open("wb") as opened:
            for chunk in client.get(store, key).stream():
                opened.write(chunk)
        if job["client"] != "obstore":
            with Path(file).open("rb", buffering=0) as written:
                hashlib.file_digest(written, "sha256")

    def all_() -> None:
        with ThreadPoolExecutor(job["at_once"]) as threads:
            list(threads.map(up if job["way"] == "up" else down, job["objects"], job["objects"].values()))

    return all_


def boto3(job: Job) -> Callable[[], object]:
    import boto3 as client
    from s3transfer.manager import TransferManager

    s3 = client.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])

    def all_() -> None:
        with TransferManager(s3) as manager:
            if job["way"] == "up":
                moving = [manager.upload(file, job["bucket"], key) for key, file in job["objects"].items()]
            else:
                moving = [manager.download(job["bucket"], key, file) for key, file in job["objects"].items()]
            for each in moving:
                each.result()

    return all_


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    work = {"llmopt": llmopt, "obstore": obstore, "boto3": boto3}[job["client"].partition(" ")[0]](job)
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    figures = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    print(json.dumps({**figures, "process_cpu_s": time.process_time()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
