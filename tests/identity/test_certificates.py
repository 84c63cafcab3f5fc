import base64
import ssl
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.authorities import BACKDATED, CERTIFICATE_LIFETIME, Authority
from hanse.identity.certificates import (
    Identity,
    SigningRequest,
    Subject,
    key_pem,
    new_key,
    new_request,
    verify_certificate,
    verify_signature,
)

from .conftest import NOW, IdentityMaker

MINUTE = timedelta(minutes=1)


def refused(pem: bytes, authority: Authority, *, now=NOW, role="client", name=None) -> str:
    with pytest.raises(Unauthenticated) as caught:
        verify_certificate(pem, authority.certificate, now=now, role_prefix=role, name=name)
    return caught.value.reason


def test_a_certificate_proves_name_organisation_role_and_key(authority: Authority, site: Identity):
    holder = verify_certificate(site.certificate, authority.certificate, now=NOW, role_prefix="client", name="site-1")

    assert (holder.name, holder.organisation, holder.role) == ("site-1", "Site", "client")
    assert verify_signature(holder.public_key, site.sign(b"data"), b"data")
    assert len(bytes.fromhex(holder.fingerprint)) == 32


def test_a_certificate_of_another_authority_is_refused_even_when_it_has_the_same_names(make_identity: IdentityMaker):
    ours, theirs = Authority.create("demo", now=NOW), Authority.create("demo", now=NOW)

    reason = refused(make_identity("site-1", by=theirs).certificate, ours)

    assert "issued by another authority" in reason


def test_any_of_several_roots_may_have_issued_it(authority: Authority, site: Identity):
    former = Authority.create("demo", now=NOW)
    roots = former.certificate + authority.certificate

    assert verify_certificate(site.certificate, roots, now=NOW, role_prefix="client").name == "site-1"


def test_a_certificate_that_a_participant_issued_is_refused(authority: Authority, site: Identity):
    # The participant's own certificate as an authority: an intermediate, which is never followed.
    upstart = Authority.create("upstart", now=NOW)
    key = new_key()
    forged = Authority("demo", upstart.certificate, upstart.key).issue(
        name="site-2", organisation="Site", role="client", public_key=key.public_key(), now=NOW
    )

    assert "another authority" in refused(forged, authority)
    assert "not one X.509 certificate" in refused(forged + site.certificate, authority)


def test_a_certificate_is_valid_to_the_last_moment_and_not_after(authority: Authority, site: Identity):
    end = NOW + CERTIFICATE_LIFETIME

    assert verify_certificate(site.certificate, authority.certificate, now=end, role_prefix="client")
    assert refused(site.certificate, authority, now=end + MINUTE).startswith(
        "the certificate of 'site-1' expired on 2030-12-27 12:00 UTC"
    )


def test_a_certificate_is_valid_a_little_before_it_was_made_and_not_earlier(authority: Authority, site: Identity):
    begin = NOW - BACKDATED

    assert verify_certificate(site.certificate, authority.certificate, now=begin, role_prefix="client")
    assert "is not valid before 2030-01-01 11:00 UTC" in refused(site.certificate, authority, now=begin - MINUTE)


def test_a_certificate_for_another_role_is_refused(authority: Authority, site: Identity):
    assert refused(site.certificate, authority, role="server") == (
        "the certificate of 'site-1' is for the role 'client', not for 'server'"
    )


@pytest.mark.parametrize(
    ("role", "wanted", "accepted"),
    [
        ("admin:lead", "admin", True),
        ("admin:lead", "admin:lead", True),
        ("admin:lead", ("client", "admin"), True),
        ("admin:lead", "admin:admin", False),
        ("admin:lead", "adm", False),
        ("admin:leader", "admin:lead", False),
        ("client", ("server", "admin"), False),
        ("client", (), False),
    ],
)
def test_a_role_is_met_by_itself_and_by_its_kinds(
    authority: Authority, make_identity: IdentityMaker, role: str, wanted: str | tuple[str, ...], accepted: bool
):
    pem = make_identity("ada", role=role).certificate

    if accepted:
        assert verify_certificate(pem, authority.certificate, now=NOW, role_prefix=wanted).role == role
    else:
        assert f"is for the role '{role}'" in refused(pem, authority, role=wanted)


def test_a_certificate_for_another_name_is_refused(authority: Authority, site: Identity):
    assert refused(site.certificate, authority, name="site-2") == "the certificate is for 'site-1', not for 'site-2'"


def test_the_authoritys_own_certificate_is_nobodys(authority: Authority):
    assert "is for the role ''" in refused(authority.certificate, authority)


@pytest.mark.parametrize(
    "pem", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\x00" * 100]
)
def test_what_is_not_a_certificate_is_refused(authority: Authority, pem: bytes):
    assert "not one X.509 certificate in PEM" in refused(pem, authority)


def test_two_certificates_or_a_huge_one_are_refused_before_anything_is_verified(authority: Authority, site: Identity):
    assert "not one X.509" in refused(site.certificate * 2, authority)
    assert "not one X.509" in refused(site.certificate + b"\n" * 100_000, authority)


def test_a_certificate_with_any_byte_changed_is_refused_or_proves_the_same(authority: Authority, site: Identity):
    # "The same": the number of unused bits of the signature, where its last bit is 0, is covered by nothing.
    original = verify_certificate(site.certificate, authority.certificate, now=NOW, role_prefix="client")
    der = ssl.PEM_cert_to_DER_cert(site.certificate.decode())

    for position in range(len(der)):
        changed = bytearray(der)
        changed[position] ^= 0x01
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(changed) + b"-----END CERTIFICATE-----\n"
        try:
            holder = verify_certificate(pem, authority.certificate, now=NOW, role_prefix="client")
        except Unauthenticated:
            continue
        assert replace(holder, fingerprint=original.fingerprint) == original


def test_roots_that_are_no_certificates_are_the_operators_error(site: Identity):
    with pytest.raises(ConfigError, match="root certificates"):
        verify_certificate(site.certificate, b"nothing", now=NOW, role_prefix="client")


def test_a_signature_holds_for_its_key_and_data_alone(site: Identity, server: Identity):
    signature = site.sign(b"data")

    assert verify_signature(site.key.public_key(), signature, b"data")
    assert not verify_signature(site.key.public_key(), signature, b"date")
    assert not verify_signature(server.key.public_key(), signature, b"data")
    assert not verify_signature(site.key.public_key(), b"", b"data")
    assert not verify_signature(site.key.public_key(), b"\x30\x00", b"data")


def test_an_identity_never_shows_its_key(site: Identity):
    assert "PRIVATE" not in repr(site)
    assert "key" not in repr(site)
    assert site.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_an_identity_knows_when_it_ends(site: Identity):
    assert site.expires == NOW + CERTIFICATE_LIFETIME


def test_an_identity_is_valid_between_its_certificates_dates_and_says_whose_it_is_when_not(site: Identity):
    site.require_valid_at(NOW)
    site.require_valid_at(site.expires)

    with pytest.raises(Unauthenticated, match=r"^the certificate of 'site-1' expired on 2030-12-27 12:00 UTC; ask the"):
        site.require_valid_at(site.expires + MINUTE)
    with pytest.raises(Unauthenticated, match=r"^the certificate of 'site-1' is not valid before 2030-01-01 11:00 UTC"):
        site.require_valid_at(NOW - BACKDATED - MINUTE)


def written(folder: Path, certificate: bytes, key: bytes) -> tuple[Path, Path]:
    (folder / "c.pem").write_bytes(certificate)
    (folder / "k.pem").write_bytes(key)
    return folder / "c.pem", folder / "k.pem"


def test_a_missing_certificate_or_key_is_named(tmp_path: Path, site: Identity):
    certificate, key = written(tmp_path, site.certificate, site.key_pem)

    with pytest.raises(ConfigError, match=r"certificate file is '.*/none.pem'.*No such file"):
        Identity.load(tmp_path / "none.pem", key)
    with pytest.raises(ConfigError, match=r"key file is '.*/none.pem'.*No such file"):
        Identity.load(certificate, tmp_path / "none.pem")


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, site: Identity, server: Identity):
    with pytest.raises(ConfigError, match=r"k.pem'; expected the key that the certificate in .*c.pem is for"):
        Identity.load(*written(tmp_path, site.certificate, server.key_pem))


def test_files_that_hold_something_else_are_named(tmp_path: Path, site: Identity):
    with pytest.raises(ConfigError, match=r"c.pem'; expected one X.509 certificate"):
        Identity.load(*written(tmp_path, site.key_pem, site.key_pem))
    with pytest.raises(ConfigError, match=r"k.pem'; expected an ECDSA P-256 private key"):
        Identity.load(*written(tmp_path, site.certificate, site.certificate))


def pkcs8(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def test_keys_of_other_kinds_and_encrypted_ones_are_refused(tmp_path: Path, site: Identity):
    others = [
        pkcs8(rsa.generate_private_key(65537, 2048)),
        pkcs8(ec.generate_private_key(ec.SECP384R1())),
        pkcs8(new_key(), b"secret"),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="expected an ECDSA P-256 private key in PEM, without a passphrase"):
            Identity.load(*written(tmp_path, site.certificate, other))


SUBJECT = Subject("site-1", "Site One", "client")


def test_a_request_says_who_asks_and_for_which_key(tmp_path: Path):
    key = new_key()
    (tmp_path / "request.pem").write_bytes(new_request(key, SUBJECT))

    assert SigningRequest.load(tmp_path / "request.pem") == SigningRequest(SUBJECT, key.public_key())


def test_a_request_with_any_byte_changed_is_refused_or_asks_for_the_same(tmp_path: Path):
    key, path = new_key(), tmp_path / "request.pem"
    der = base64.b64decode(b"".join(new_request(key, SUBJECT).splitlines()[1:-1]))
    for position in range(len(der)):
        changed = bytearray(der)
        changed[position] ^= 0x01
        path.write_bytes(
            b"-----BEGIN CERTIFICATE REQUEST-----\n"
            + base64.encodebytes(changed)
            + b"-----END CERTIFICATE REQUEST-----\n"
        )
        try:
            asked = SigningRequest.load(path)
        except ConfigError:
            continue
        assert asked == SigningRequest(SUBJECT, key.public_key())


def test_a_request_for_a_key_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "request.pem"
    path.write_bytes(new_request(ec.generate_private_key(ec.SECP384R1()), SUBJECT))

    with pytest.raises(ConfigError, match="request file"):
        SigningRequest.load(path)


@pytest.mark.parametrize(
    ("subject", "field"),
    [
        (Subject("site.1", "Site", "client"), "name"),
        (Subject("", "Site", "client"), "name"),
        (Subject("site-1", "", "client"), "organisation"),
        (Subject("site-1", "S" * 65, "client"), "organisation"),
        (Subject("site-1", "Site\n", "client"), "organisation"),
        (Subject("site-1", "Site", "boss"), "role"),
        (Subject("site-1", "Site", "admin"), "role"),
        (Subject("site-1", "Site", "client:x"), "role"),
    ],
)
def test_a_subject_that_cannot_be_certified_is_refused_by_field(subject: Subject, field: str):
    with pytest.raises(ConfigError) as caught:
        subject.require_certifiable()
    assert caught.value.field == field


def test_a_subject_with_letters_of_any_script_survives_a_certificate(tmp_path: Path, authority: Authority):
    key = new_key()
    pem = authority.issue(
        name="site-1", organisation="Universitätsklinikum 東京", role="client", public_key=key.public_key(), now=NOW
    )

    identity = Identity.load(*written(tmp_path, pem, key_pem(key)))

    assert identity.organisation == "Universitätsklinikum 東京"
