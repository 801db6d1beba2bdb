"""Our signatures are those of AWS's own library, whatever is signed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, urlsplit

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "program"))

from s3_transfer.settings import Credentials, Settings
from s3_transfer.signing import UNSIGNED, Signer, canonical

NOW = datetime(2026, 1, 31, 12, 34, 56, tzinfo=UTC)
TEXT = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), max_size=12)
KEYS = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda key: not {".", ".."} & set(key.split("/"))
)
WORDS = st.text("abcXYZ019-_./ +%&=~", max_size=10)
CREDENTIALS = st.builds(
    Credentials, st.text("AKID019", min_size=1, max_size=20), st.text("abc/+=", min_size=1, max_size=40),
    st.none() | st.text("tok/+=", min_size=1, max_size=20),
)  # fmt: skip
ENDPOINTS = st.sampled_from(["https://s3.example", "http://127.0.0.1:9000", "https://[::1]:9443/base", "http://h:80"])


def place(endpoint: str, addressing: str) -> Settings:
    return Settings.read({"bucket": "builds", "endpoint": endpoint, "addressing": addressing, "region": "eu-1"}, {})


class Theirs(S3SigV4Auth):  # type: ignore[misc]
    def payload(self, request: Any) -> str:
        return str(request.context["payload"])


@given(
    credentials=CREDENTIALS,
    endpoint=ENDPOINTS,
    addressing=st.sampled_from(["path", "virtual"]),
    key=KEYS,
    query=st.dictionaries(WORDS.filter(bool), TEXT, max_size=3),
    headers=st.dictionaries(
        st.sampled_from(["x-amz-tagging", "X-Amz-Acl", "Content-Type", "Range"]), WORDS, max_size=3
    ),
)
@settings(deadline=None, max_examples=60)
def test_signed_headers_are_those_of_botocore(
    credentials: Credentials, endpoint: str, addressing: str, key: str, query: dict[str, str], headers: dict[str, str]
) -> None:
    assume(addressing == "path" or "[" not in endpoint)  # there is no name before an address
    where, text = place(endpoint, addressing), canonical(query)
    sent = dict(headers)
    Signer(credentials, "eu-1", lambda: NOW).headers("PUT", where, key, text, sent, UNSIGNED)
    given = {name: value for name, value in headers.items() if name != "Range"}
    request = AWSRequest("PUT", where.url(key, text), headers=given)
    request.context["payload"] = UNSIGNED
    theirs = Theirs(BotoCredentials(credentials.key_id, credentials.secret, credentials.token), "s3", "eu-1")
    with mock.patch("botocore.auth.get_current_datetime", return_value=NOW):
        theirs.add_auth(request)
    assert sent["Authorization"] == request.headers["Authorization"]


@given(
    credentials=CREDENTIALS, endpoint=ENDPOINTS, key=KEYS, query=st.dictionaries(WORDS.filter(bool), TEXT, max_size=2)
)
@settings(deadline=None, max_examples=40)
def test_presigned_urls_are_those_of_botocore(
    credentials: Credentials, endpoint: str, key: str, query: dict[str, str]
) -> None:
    where = place(endpoint, "path")
    ours = Signer(credentials, "eu-1", lambda: NOW).query("GET", where, key, query, 600)
    request = AWSRequest("GET", where.url(key, canonical(query)))
    known = BotoCredentials(credentials.key_id, credentials.secret, credentials.token)
    with mock.patch("botocore.auth.get_current_datetime", return_value=NOW):
        S3SigV4QueryAuth(known, "s3", "eu-1", expires=600).add_auth(request)
    theirs = parse_qs(urlsplit(request.url).query, keep_blank_values=True)
    mine = parse_qs(ours, keep_blank_values=True)
    assert {name: value for name, value in mine.items() if name != "X-Amz-Signature"} == {
        name: value for name, value in theirs.items() if name != "X-Amz-Signature"
    }


def test_buckets_stand_before_the_host_or_in_the_path() -> None:
    assert place("https://s3.example/base/", "path").url("a/ü") == "https://s3.example/base/builds/a/%C3%BC"
    assert place("https://s3.example", "virtual").url("k") == "https://builds.s3.example/k"
    aws = {"bucket": "builds", "region": "eu-central-1"}
    assert Settings.read(aws, {}).url("k") == "https://builds.s3.eu-central-1.amazonaws.com/k"
    dotted = Settings.read(aws | {"bucket": "my.builds"}, {}).url("k")
    assert dotted == "https://s3.eu-central-1.amazonaws.com/my.builds/k"
    assert Settings.read(aws | {"region": "cn-north-1"}, {}).host.endswith(".amazonaws.com.cn")
