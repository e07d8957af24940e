"""Keys per second of listing a prefix on S3: boto3's paginator, our pages one after the other, and several at once.

    python benchmarks/listing.py [--keys 50000] [--page-seconds 0.05] [--rounds 3]

The store is a process of its own on this machine, which answers ListObjectsV2 alone, each page after a pause, as a
store some way off does. The three take turns. All must give the same keys in the same order.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3

from dinoray.pipeline.data.listing.listing import list_entries
from dinoray.pipeline.storage.s3 import list_pages

_PAGE = 1000
_BUCKET = "bucket"


def layouts(num_keys: int) -> dict[str, list[str]]:
    """Return sorted keys by the name of their layout, each a prefix of its own."""
    classes = (f"n{number % 1000:08}" for number in range(num_keys))
    return {
        "25 folders": sorted(f"few/{n % 25:02}/{n:07}.jpg" for n in range(num_keys)),
        "1,000 folders": sorted(f"many/{name}/{n:07}.jpg" for n, name in enumerate(classes)),
        "no folders": [f"flat/{n:07}.jpg" for n in range(num_keys)],
    }


def serve(keys: list[str], page_seconds: float, address: Connection) -> None:
    """Answer ListObjectsV2 for `keys` (sorted) until the process is ended."""
    items = [
        f'<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"{n:032x}"</ETag>'
        f"<Size>{n}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for n, key in enumerate(keys)
    ]

    def answer(query: dict[str, str]) -> str:
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        begin = max(bisect_left(keys, prefix), bisect_right(keys, after))
        end = bisect_left(keys, prefix + "\U0010ffff")
        if query.get("delimiter"):
            names = {
                prefix + key[len(prefix) :].partition("/")[0]
                for key in keys[begin:end]
                if "/" in key[len(prefix) :]
            }
            folders = sorted(names)[:_PAGE]
            parts = "".join(f"<CommonPrefixes><Prefix>{name}/</Prefix></CommonPrefixes>" for name in folders)
            return f"<IsTruncated>false</IsTruncated>{parts}"
        last = min(begin + _PAGE, end)
        more = f"<NextContinuationToken>{keys[last - 1]}</NextContinuationToken>" if last < end else ""
        return f"<IsTruncated>{str(last < end).lower()}</IsTruncated>{more}{''.join(items[begin:last])}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            space = "http://s3.amazonaws.com/doc/2006-03-01/"
            body = f'<?xml version="1.0"?><ListBucketResult xmlns="{space}">{answer(query)}</ListBucketResult>'.encode()
            time.sleep(page_seconds)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


def with_boto3(prefix: str) -> list[str]:
    """Return all keys by boto3's own paginator."""
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=_BUCKET, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


def one_after_the_other(prefix: str) -> list[str]:
    """Return all keys with one request under way."""
    return [key for page in list_pages(_BUCKET, prefix) for key in page.objects.keys]


def several_at_once(prefix: str) -> list[str]:
    """Return all keys as a run lists them."""
    return [
        key for batch in list_entries(f"s3://{_BUCKET}/{prefix}").batches for key in batch["key"].to_pylist()
    ]


WAYS: dict[str, Callable[[str], list[str]]] = {
    "boto3": with_boto3,
    "one after the other": one_after_the_other,
    "several at once": several_at_once,
}


def measure(name: str, keys: list[str], args: Any) -> None:
    """Print a row of the table."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(keys, args.page_seconds, there), daemon=True
    )
    server.start()
    os.environ |= {"AWS_ENDPOINT_URL": here.recv(), "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    prefix = keys[0].partition("/")[0] + "/"
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, listed in WAYS.items():
            begin = time.perf_counter()
            if listed(prefix) != keys:
                raise SystemExit(f"{way} of {name} gave other keys")
            seconds[way].append(time.perf_counter() - begin)
    server.terminate()
    rates = [len(keys) / statistics.median(taken) for taken in seconds.values()]
    columns = [f"{rate:,.0f}" for rate in rates] + [f"{rates[2] / rate:.1f}" for rate in rates[:2]]
    print(f"| {name} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    """Measure each layout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=50_000)
    parser.add_argument("--page-seconds", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.keys:,} keys, {1000 * args.page_seconds:.0f} ms a page, keys/s, median of {args.rounds}\n")
    print(f"| layout | {' | '.join(WAYS)} | / boto3 | / one after the other |")
    print(f"|---|{'---|' * (len(WAYS) + 2)}")
    for name, keys in layouts(args.keys).items():
        measure(name, keys, args)


if __name__ == "__main__":
    main()
