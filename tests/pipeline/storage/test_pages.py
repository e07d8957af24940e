"""The quick reading of a page of a listing gives what botocore alone gives, for any answer, whole or damaged."""

from typing import Any
from xml.etree import ElementTree

import botocore.awsrequest
import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.storage import pages
from dinoray.pipeline.storage.pages import Page, request_page

SPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
PLAIN = {"Key": "a/b.jpg", "Size": "7", "ETag": '"0f"', "StorageClass": "STANDARD"}


class Store:
    """A client of botocore whose requests all get one answer, without a network."""

    def __init__(self, *, quick: bool) -> None:
        self.body = b""
        self.client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
            config=Config(retries={"total_max_attempts": 1}),
        )
        self.client.meta.events.register("before-send.s3", self._answer)
        if quick:
            self.client.meta.events.register(pages.EVENT, pages.take_objects)

    def _answer(self, request: Any, **_: Any) -> botocore.awsrequest.AWSResponse:
        response = botocore.awsrequest.AWSResponse(request.url, 200, {}, raw=None)
        response._content = self.body
        return response

    def page(self, body: bytes) -> Page | str:
        """Return the page that is read from an answer, or the kind of its error."""
        self.body = body
        try:
            return request_page(self.client.list_objects_v2, Bucket="bucket")
        except (BotoCoreError, ClientError, KeyError, ValueError) as error:
            return type(error).__name__


@pytest.fixture(scope="module")
def quick() -> Store:
    return Store(quick=True)


@pytest.fixture(scope="module")
def botocore_alone() -> Store:
    return Store(quick=False)


def answer_of(objects: list[dict[str, str]], **others: str) -> bytes:
    """Return the XML of an answer, written by the standard library."""
    root = ElementTree.Element("ListBucketResult", xmlns=SPACE)
    for name, text in {"Name": "bucket", "IsTruncated": "false", **others}.items():
        ElementTree.SubElement(root, name).text = text
    for item in objects:
        element = ElementTree.SubElement(root, "Contents")
        for name, text in {**item, "LastModified": "2026-01-01T00:00:00.000Z"}.items():
            ElementTree.SubElement(element, name).text = text
        owner = ElementTree.SubElement(element, "Owner")
        ElementTree.SubElement(owner, "ID").text = "x"
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


TEXTS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=12)
ITEMS = st.fixed_dictionaries(
    {
        "Key": TEXTS | st.sampled_from(["a/b.jpg", "a%2Fb.jpg", "a+b", "%zz", "a&b", "<x>", "ä", " x "]),
        "Size": st.integers(0, 10**12).map(str),
        "ETag": st.sampled_from(['"0f"', '"0f-2"', "0f", 'W/"0f"', ""]),
    },
    optional={
        "StorageClass": st.sampled_from(["STANDARD", "GLACIER", ""]),
        "ChecksumAlgorithm": st.just("CRC32"),
    },
)


@given(objects=st.lists(ITEMS, max_size=5), others=st.sampled_from([{}, {"EncodingType": "url"}]))
def test_it_reads_what_botocore_reads(
    quick: Store, botocore_alone: Store, objects: list[dict[str, str]], others: dict[str, str]
) -> None:
    body = answer_of(objects, **others)
    assert quick.page(body) == botocore_alone.page(body)


@given(data=st.data())
def test_a_damaged_answer_ends_as_with_botocore_alone(
    quick: Store, botocore_alone: Store, data: st.DataObject
) -> None:
    body = bytearray(answer_of([PLAIN, {**PLAIN, "Key": "c"}], NextContinuationToken="t"))
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body))) :]
    else:
        # Text differs only by what a store may have written; tags and their frames are what damage shows in.
        places = [place for place in range(len(body)) if chr(body[place]) in "<>/&;="]
        body[data.draw(st.sampled_from(places))] = data.draw(st.sampled_from(b"<>&;x\x00\x01\xff "))
    assert quick.page(bytes(body)) == botocore_alone.page(bytes(body))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"<Key>a/b.jpg", b"<Key><![CDATA[a/b.jpg]]>"),
        (b"<Key>", b"<!-- a comment --><Key>"),
        (b"<Key>a/b.jpg", b"<Key>&#97;/b.jpg"),
        (b"<Key>a/b.jpg</Key>", b""),
        (b"<Key>a/b.jpg</Key>", b"<Key/>"),
        (b"<Size>7</Size>", b""),
        (b"<Size>7</Size>", b"<Size>many</Size>"),
        (b"<Contents>", b'<Contents a="1">'),
        (b"utf-8", b"latin-1"),
        (b"<Key>a/b.jpg", b"<Key>\xe4"),
        (b"<Key>a/b.jpg", b"<Key>a\r\nb"),
        (b"ListBucketResult", b"Error"),
        (b"<Owner><ID>x</ID></Owner>", b"<Owner/>"),
        (
            b"<Owner>",
            b"<RestoreStatus><IsRestoreInProgress>true</IsRestoreInProgress></RestoreStatus><Owner>",
        ),
    ],
)
def test_an_unusual_answer_is_read_as_botocore_reads_it(
    quick: Store, botocore_alone: Store, old: bytes, new: bytes
) -> None:
    body = answer_of([PLAIN]).replace(old, new)
    assert old == b"utf-8" or new in body
    assert quick.page(body) == botocore_alone.page(body)


def test_no_handler_of_botocore_sees_the_objects_of_a_usual_answer(quick: Store) -> None:
    seen: list[bytes] = []

    def look(response_dict: dict[str, Any], **_: Any) -> None:
        seen.append(response_dict["body"])

    quick.client.meta.events.register_first("before-parse.s3.*", look)
    page = quick.page(answer_of([PLAIN] * 3, EncodingType="url"))
    assert not isinstance(page, str)
    assert page.objects.keys == ["a/b.jpg"] * 3
    assert [b"<Contents" in body for body in seen] == [False]
