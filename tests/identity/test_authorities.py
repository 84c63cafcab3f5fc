from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.authorities import AUTHORITY_LIFETIME, Authority, JobAuthority
from hanse.identity.certificates import Identity, certified_hosts, new_key, verify_certificate
from hanse.identity.servers_secret import ServersSecret
from hanse.ids import Fqcn

from .conftest import NOW, IdentityMaker, load_identity

JOB = Fqcn("site-1.20300101-abc")
SHARED = ServersSecret(bytes(range(32))).for_job_authority()
ORDER = 115792089210356248762697446949407573529996955224135760342422259061068512044369  # FIPS 186-4, D.1.2.3


def parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_an_authority_that_was_saved_issues_what_the_original_verifies(tmp_path: Path, authority: Authority):
    authority.save(tmp_path / "authority")
    loaded = Authority.load(tmp_path / "authority")
    pem = loaded.issue(name="x", organisation="X", role="client", public_key=new_key().public_key(), now=NOW)

    assert loaded.project == "demo"
    assert loaded.fingerprint == authority.fingerprint
    assert verify_certificate(pem, authority.certificate, now=NOW, role_prefix="client").name == "x"


def test_an_authoritys_files_are_private(tmp_path: Path, authority: Authority):
    authority.save(tmp_path / "authority")

    assert (tmp_path / "authority").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "authority" / "ca.key").stat().st_mode & 0o777 == 0o600


def test_an_authority_whose_key_others_can_read_is_refused(tmp_path: Path, authority: Authority):
    authority.save(tmp_path)
    (tmp_path / "ca.key").chmod(0o640)

    with pytest.raises(ConfigError, match=r"ca.key with mode 0640"):
        Authority.load(tmp_path)


def test_an_authority_is_named_for_its_project_and_issues_no_authorities(authority: Authority):
    certificate = parsed(authority.certificate)

    assert certificate.subject.rfc4514_string() == "O=demo,CN=demo CA"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)


@pytest.mark.parametrize("project", ["", "a.b", "p" * 62])
def test_a_project_that_cannot_stand_in_a_certificate_is_refused(project: str):
    with pytest.raises(ConfigError, match="project"):
        Authority.create(project, now=NOW)


def test_the_longest_project_name_works():
    assert Authority.create("p" * 61, now=NOW).project == "p" * 61


def test_a_servers_certificate_is_good_for_its_hosts_and_its_name(server: Identity):
    assert certified_hosts(parsed(server.certificate)) == {"localhost", "127.0.0.1", "::1", "server"}


def test_a_servers_name_that_is_no_host_name_is_left_out_of_its_hosts(make_identity: IdentityMaker):
    identity = make_identity("the_server", role="server", hosts=["*.example.org", "*.example.org"])

    assert certified_hosts(parsed(identity.certificate)) == {"*.example.org"}


def test_a_clients_certificate_cannot_serve_and_a_servers_cannot_call(site: Identity, server: Identity):
    usages = [
        list(parsed(identity.certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        for identity in (site, server)
    ]
    assert usages == [[ExtendedKeyUsageOID.CLIENT_AUTH], [ExtendedKeyUsageOID.SERVER_AUTH]]


@pytest.mark.parametrize("host", ["", "localhost:6007", "[::1]", "ex ample", "münchen.de", "-a.org", "a..b", "x" * 64])
def test_a_host_that_is_no_host_is_refused(make_identity: IdentityMaker, host: str):
    with pytest.raises(ConfigError) as caught:
        make_identity("server", role="server", hosts=[host])
    assert (caught.value.field, caught.value.got) == ("hosts", host)


def test_a_key_of_another_kind_is_not_certified(authority: Authority):
    other = ec.generate_private_key(ec.SECP384R1()).public_key()

    with pytest.raises(ConfigError, match="P-256"):
        authority.issue(name="x", organisation="X", role="client", public_key=other, now=NOW)


def test_a_certificate_ends_with_its_authority_at_the_latest(make_identity: IdentityMaker):
    short = Authority.create("demo", now=NOW, lifetime=timedelta(days=10))

    assert make_identity("site-1", by=short).expires == NOW + timedelta(days=10)


def test_an_expired_authority_issues_nothing(authority: Authority):
    with pytest.raises(ConfigError, match="expired since 2039-12-30"):
        authority.issue(
            name="x", organisation="X", role="client", public_key=new_key().public_key(), now=NOW + AUTHORITY_LIFETIME
        )


def test_a_job_certificate_names_its_cell(tmp_path: Path):
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)
    certificate, key = jobs.issue(JOB, now=NOW)

    assert jobs.verify(certificate, now=NOW) == JOB
    assert load_identity(tmp_path, certificate, key).name == JOB


def test_the_longest_cell_name_fits_in_a_job_certificate(tmp_path: Path):
    longest = Fqcn(f"{'s' * 63}.{'j' * 63}")
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)
    certificate, key = jobs.issue(longest, now=NOW)

    assert jobs.verify(certificate, now=NOW) == longest
    assert load_identity(tmp_path, certificate, key).name == "job"


def test_a_job_certificate_never_proves_a_participant(tmp_path: Path, authority: Authority):
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)
    certificate, _ = jobs.issue(JOB, now=NOW)

    with pytest.raises(Unauthenticated, match="another authority"):
        verify_certificate(certificate, authority.certificate, now=NOW, role_prefix=("client", "admin", "server"))
    with pytest.raises(Unauthenticated, match="is for the role 'job'"):  # not even where the roots were mixed up
        verify_certificate(certificate, jobs.certificate, now=NOW, role_prefix=("client", "admin", "server"))


def test_a_participants_certificate_is_not_a_jobs(tmp_path: Path, site: Identity):
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)

    with pytest.raises(Unauthenticated, match="another authority"):
        jobs.verify(site.certificate, now=NOW)
    with pytest.raises(Unauthenticated, match="not that of a job's process"):
        jobs.verify(jobs.certificate, now=NOW)


def test_an_expired_job_certificate_is_refused(tmp_path: Path):
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)
    certificate, _ = jobs.issue(JOB, now=NOW, lifetime=timedelta(hours=1))

    with pytest.raises(Unauthenticated, match="expired"):
        jobs.verify(certificate, now=NOW + timedelta(hours=2))


def test_a_job_certificate_can_only_call(tmp_path: Path):
    certificate, _ = JobAuthority.load_or_create(tmp_path, now=NOW).issue(JOB, now=NOW)

    usage = parsed(certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_the_job_authority_survives_a_restart_in_one_private_file(tmp_path: Path):
    first = JobAuthority.load_or_create(tmp_path / "new", now=NOW)
    certificate, _ = first.issue(JOB, now=NOW)

    second = JobAuthority.load_or_create(tmp_path / "new", now=NOW + timedelta(days=1))

    assert second.verify(certificate, now=NOW) == JOB
    assert second.key_id == first.key_id
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_job_authoritys_certificate_is_made_anew_at_each_start(tmp_path: Path):
    first = JobAuthority.load_or_create(tmp_path, now=NOW)
    later = NOW + AUTHORITY_LIFETIME + timedelta(days=1)
    second = JobAuthority.load_or_create(tmp_path, now=later)

    assert second.certificate != first.certificate
    assert second.verify(second.issue(JOB, now=later)[0], now=later) == JOB


def test_a_clock_that_is_set_back_undoes_no_job_certificate(tmp_path: Path):
    jobs = JobAuthority.load_or_create(tmp_path, now=NOW)
    certificate, _ = jobs.issue(JOB, now=NOW)

    assert jobs.verify(certificate, now=NOW - timedelta(days=9)) == JOB


def test_a_job_authority_that_others_can_read_or_that_is_damaged_is_refused(tmp_path: Path):
    JobAuthority.load_or_create(tmp_path, now=NOW)
    (file,) = tmp_path.iterdir()
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644"):
        JobAuthority.load_or_create(tmp_path, now=NOW)
    file.chmod(0o600)
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="key file"):
        JobAuthority.load_or_create(tmp_path, now=NOW)


def test_servers_with_one_secret_issue_what_the_others_verify():
    one, other = (
        JobAuthority.from_secret(SHARED, now=NOW),
        JobAuthority.from_secret(SHARED, now=NOW + timedelta(days=9)),
    )
    certificate, _ = one.issue(JOB, now=NOW)

    assert other.certificate != one.certificate
    assert other.verify(certificate, now=NOW) == JOB
    issuer = parsed(certificate).extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert issuer.key_identifier is not None
    assert other.key_id == one.key_id == issuer.key_identifier.hex(), "by which what they issue names them, too"


def test_servers_with_other_secrets_do_not():
    certificate, _ = JobAuthority.from_secret(SHARED, now=NOW).issue(JOB, now=NOW)
    other = JobAuthority.from_secret(bytes(48), now=NOW)

    assert other.key_id != JobAuthority.from_secret(SHARED, now=NOW).key_id
    with pytest.raises(Unauthenticated, match="another authority"):
        other.verify(certificate, now=NOW)


@pytest.mark.parametrize(
    ("secret", "number"),
    [
        (SHARED, int(SHARED.hex(), 16) % (ORDER - 1) + 1),
        (bytes(48), 1),
        ((ORDER - 2).to_bytes(48, "big"), ORDER - 1),
        ((ORDER - 1).to_bytes(48, "big"), 1),
    ],
    ids=["random", "least", "greatest", "least again"],
)
def test_a_shared_key_is_a_number_below_the_order_of_the_curve(secret: bytes, number: int):
    assert JobAuthority.from_secret(secret, now=NOW).key.private_numbers().private_value == number


def test_the_shared_key_never_changes_so_that_servers_of_two_releases_share_it():
    key = JobAuthority.from_secret(SHARED, now=NOW).key

    assert (
        f"{key.public_key().public_numbers().x:064x}"
        == "b5672566e9313aec46eb5283e735238594526c3c8658915669629ce0fc40b1e5"
    )


def test_a_shared_authority_outlives_a_clock_that_is_set_back_and_lasts_from_each_start_anew():
    certificate = parsed(JobAuthority.from_secret(SHARED, now=NOW).certificate)

    assert certificate.not_valid_before_utc == NOW - AUTHORITY_LIFETIME
    assert certificate.not_valid_after_utc == NOW + AUTHORITY_LIFETIME


def test_too_short_a_secret_is_refused():
    with pytest.raises(ValueError, match="at least 40 bytes, not 32"):
        JobAuthority.from_secret(bytes(32), now=NOW)
