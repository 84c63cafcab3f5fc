import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import Unauthenticated
from hanse.identity.authorities import Authority
from hanse.identity.certificates import Identity, new_key, verify_signature
from hanse.identity.transcript import client_half, framed, server_half, transcript

from .conftest import NOW

AUTHORITY = Authority.create("demo", now=NOW)
CERTIFICATES = [
    b"",
    *(
        AUTHORITY.issue(name=name, organisation="X", role="client", public_key=new_key().public_key(), now=NOW)
        for name in ("a", "b")
    ),
]

FIELDS = st.fixed_dictionaries(
    {
        "project": st.text(max_size=8),
        "client": st.text(max_size=8),
        "server": st.text(max_size=8),
        "client_nonce": st.binary(max_size=8),
        "server_nonce": st.binary(max_size=8),
        "client_certificate": st.sampled_from(CERTIFICATES),
        "server_certificate": st.sampled_from(CERTIFICATES),
    }
)


def conversation(**changes: object) -> bytes:
    fields = {
        "project": "demo",
        "client": "site-1",
        "server": "server",
        "client_nonce": b"c" * 32,
        "server_nonce": b"s" * 32,
        "client_certificate": CERTIFICATES[1],
        "server_certificate": CERTIFICATES[2],
    }
    return transcript(**(fields | changes))


@given(FIELDS, FIELDS)
def test_two_conversations_have_the_same_transcript_only_if_they_are_the_same(one: dict, other: dict):
    assert (transcript(**one) == transcript(**other)) == (one == other)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_framing_never_gives_two_sequences_the_same_bytes(one: list[bytes], other: list[bytes]):
    assert (framed(*one) == framed(*other)) == (one == other)


@given(st.text(max_size=6), st.text(max_size=6))
def test_a_letter_moved_from_one_name_to_the_next_changes_the_transcript(client: str, server: str):
    joined = client + server
    transcripts = {conversation(client=joined[:cut], server=joined[cut:]) for cut in range(len(joined) + 1)}
    assert len(transcripts) == len(joined) + 1


@pytest.mark.parametrize(
    "change",
    [
        {"project": "demo2"},
        {"client": "site-2"},
        {"server": "server2"},
        {"client_nonce": b"x" * 32},
        {"server_nonce": b"x" * 32},
        {"client_nonce": b"s" * 32, "server_nonce": b"c" * 32},
        {"client_certificate": CERTIFICATES[2]},
        {"server_certificate": CERTIFICATES[1]},
        {"client_certificate": b""},
        {"client_certificate": CERTIFICATES[2], "server_certificate": CERTIFICATES[1]},
    ],
)
def test_a_signature_does_not_hold_when_any_field_is_changed(site: Identity, change: dict):
    signature = site.sign(client_half(conversation()))

    assert verify_signature(site.key.public_key(), signature, client_half(conversation()))
    assert not verify_signature(site.key.public_key(), signature, client_half(conversation(**change)))


def test_a_signature_does_not_hold_when_any_byte_of_the_transcript_is_changed(site: Identity):
    half = client_half(conversation())
    signature = site.sign(half)

    for position in range(len(half)):
        changed = bytearray(half)
        changed[position] ^= 0x01
        assert not verify_signature(site.key.public_key(), signature, bytes(changed))
    for shorter, longer in itertools.product((half[:-1], half[1:]), (half + b"\0", b"\0" + half)):
        assert not verify_signature(site.key.public_key(), signature, shorter)
        assert not verify_signature(site.key.public_key(), signature, longer)


def test_one_sides_proof_sent_back_is_not_the_others(site: Identity):
    # Reflection: whoever holds one key must not be able to answer for both sides.
    said = conversation()
    signature = site.sign(server_half(said))

    assert server_half(said) != client_half(said)
    assert not verify_signature(site.key.public_key(), signature, client_half(said))


def test_a_certificates_line_ends_do_not_matter():
    other_ends = CERTIFICATES[1].replace(b"\n", b"\r\n")

    assert conversation(client_certificate=other_ends) == conversation()


def test_something_else_in_the_place_of_a_certificate_is_refused():
    with pytest.raises(Unauthenticated, match="not one X"):
        conversation(client_certificate=b"hello")
