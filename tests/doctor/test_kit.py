from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hanse.doctor.findings import Finding, Verdict
from hanse.doctor.kit import judge_certificate, judge_dates, judge_key, judge_settings, read_kit
from hanse.errors import CertificateExpired, ConfigError, Unauthenticated
from hanse.identity.authorities import Authority
from hanse.identity.certificates import one_certificate
from tests.certificates import certify_anew

from .conftest import Copy

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def found(kit: Path, now: datetime = NOW) -> tuple[Finding, Finding, Finding, Finding]:
    facts = read_kit(kit)
    return judge_settings(facts), judge_key(facts), judge_certificate(facts), judge_dates(facts, now)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("server", "server is the server of project demo; listens at 0.0.0.0:6007"),
        ("site-1", "site-1 is a client of project demo; dials localhost:6007, 127.0.0.1:6007"),
        ("ada@demo", "ada@demo is an administrator of project demo; dials localhost:6007, 127.0.0.1:6007"),
    ],
)
def test_a_kit_of_any_kind_is_found_good(kits: Path, name: str, words: str):
    settings, key, certificate, dates = found(kits / name)

    assert [one.verdict for one in (settings, key, certificate, dates)] == [Verdict.OK] * 4
    assert settings.text == words
    assert certificate.text.startswith(f"of {name} (demo, ")
    assert dates.text.startswith("valid until ")


def test_a_folder_that_is_none_fails_once(tmp_path: Path):
    settings, *rest = found(tmp_path / "nothing")

    assert settings.verdict is Verdict.FAIL
    assert "settings.toml'; expected a readable file (No such file or directory)" in settings.text
    assert {one.verdict for one in rest} == {Verdict.SKIP}


def test_settings_that_do_not_hold_are_named_and_the_certificate_waits_for_them(kits: Path, copy_of: Copy):
    settings, key, certificate, dates = found(copy_of(kits / "site-1", more="patience = 3"))

    assert isinstance(settings.error, ConfigError)
    assert settings.text.startswith("patience in ")
    assert certificate.text == "not checked: 'settings' failed"
    assert (key.verdict, dates.verdict) == (Verdict.OK, Verdict.OK)


def test_a_key_that_others_can_read_is_found(kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    (kit / "key.pem").chmod(0o644)
    settings, key, certificate, dates = found(kit)

    assert isinstance(key.error, ConfigError)
    assert "with mode 0644'; expected a file that only its owner can read: chmod 600" in key.text
    assert certificate.text == "not checked: 'key' failed"
    assert (settings.verdict, dates.verdict) == (Verdict.OK, Verdict.OK)


def test_a_key_of_another_user_is_a_warning(kits: Path):
    finding = judge_key(replace(read_kit(kits / "site-1"), key_owner=1001, user=0))

    assert finding.verdict is Verdict.WARN
    assert "key.pem belongs to user 1001, and this is user 0: run the doctor as whoever" in finding.text


def test_a_file_that_holds_no_key_is_no_key(kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    (kit / "key.pem").write_text("nothing")

    assert "an ECDSA P-256 private key in PEM" in found(kit)[1].text


def test_a_key_of_another_certificate_is_found(kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    (kit / "key.pem").write_bytes((kits / "ada@demo" / "key.pem").read_bytes())
    settings, key, certificate, _ = found(kit)

    assert (settings.verdict, key.verdict) == (Verdict.OK, Verdict.OK)
    assert isinstance(certificate.error, ConfigError)
    assert "expected the key that the certificate in" in certificate.text


def test_an_authority_of_another_project_is_found(kits: Path, others_kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    (kit / "ca.pem").write_bytes((others_kits / "site-1" / "ca.pem").read_bytes())

    assert f"expected one issued by {kit / 'ca.pem'}" in found(kit)[2].text


def test_a_certificate_that_cannot_be_read_is_found_by_its_own_check(kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    (kit / "cert.pem").write_text("nothing")
    settings, _, certificate, dates = found(kit)

    assert settings.text.startswith("site-1 is a client")
    assert "expected one X.509 certificate in PEM" in certificate.text
    assert dates.verdict is Verdict.SKIP


@pytest.mark.parametrize("content", ["nothing", ""])
def test_roots_of_a_proxy_that_are_none_are_named(kits: Path, copy_of: Copy, content: str):
    kit = copy_of(kits / "site-1", more='tls_roots = "proxy.pem"')
    (kit / "proxy.pem").write_text(content)

    assert found(kit)[2].text == "tls_roots is 'proxy.pem'; expected a PEM file of certificates"


def test_a_kit_that_awaits_its_certificate_says_what_is_missing(kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    (kit / "cert.pem").rename(kit / "request.pem")
    settings, *_ = found(kit)

    assert "without cert.pem'; expected what 'hanse kit install' makes of it" in settings.text


@pytest.mark.parametrize(("line", "kind"), [('servers = ["localhost:1"]', "a client"), ("", "the server")])
def test_a_kit_without_certificates_has_none_to_look_at(tmp_path: Path, line: str, kind: str):
    (tmp_path / "settings.toml").write_text(f'project = "demo"\nname = "one"\ntls = false\n{line}\n')
    settings, key, certificate, dates = found(tmp_path)

    assert settings.text.startswith(f"one is {kind} of project demo")
    assert [one.verdict for one in (key, certificate, dates)] == [Verdict.SKIP] * 3


@pytest.mark.parametrize("line", ['servers = ["localhost:1"]', "", 'tls = false\nstore = "postgresql://one:two@h/db"'])
def test_a_kit_that_cannot_be_used_without_certificates_is_found(tmp_path: Path, line: str):
    (tmp_path / "settings.toml").write_text(f'project = "demo"\nname = "one"\n{line}\n')
    (tmp_path / "settings.toml").chmod(0o644)
    settings, key, certificate, dates = found(tmp_path)

    assert settings.verdict is Verdict.OK
    assert [one.verdict for one in (key, dates)] == [Verdict.SKIP] * 2
    assert isinstance(certificate.error, ConfigError)
    assert str(tmp_path) in certificate.text  # the file that is missing, or that others can read


def test_an_expired_certificate_is_named_with_the_day_and_what_to_do(kits: Path, copy_of: Copy):
    kit = copy_of(kits / "site-1")
    certify_anew(kit, kits / "authority", made=NOW - 400 * DAY)
    *_, certificate, dates = found(kit)

    assert certificate.verdict is Verdict.OK
    assert isinstance(dates.error, CertificateExpired)
    assert dates.text == (
        f"the certificate of 'site-1' expired on {NOW - 40 * DAY:%Y-%m-%d %H:%M} UTC; ask the project for a new one "
        f"(it is {NOW:%Y-%m-%d %H:%M} UTC by this machine's clock)"
    )


def test_a_certificate_of_a_time_to_come_is_found(kits: Path):
    dates = found(kits / "site-1", NOW - 2 * DAY)[3]

    assert isinstance(dates.error, Unauthenticated)
    assert "is not valid before" in dates.text


def test_a_certificate_that_ends_within_30_days_is_a_warning(kits: Path):
    certificate = read_kit(kits / "site-1").certificate
    assert certificate is not None
    ends = certificate.not_valid_after_utc

    assert found(kits / "site-1", ends - 30 * DAY)[3].verdict is Verdict.OK
    dates = found(kits / "site-1", ends - 12 * DAY)[3]
    assert dates.verdict is Verdict.WARN
    assert dates.text == (
        f"the certificate of 'site-1' expires on {ends:%Y-%m-%d %H:%M} UTC, in 12 days; ask the project for a new one"
    )


def test_an_authority_that_ends_soon_or_has_ended_is_found_too(kits: Path):
    facts = read_kit(kits / "site-1")
    old = Authority.create("demo", now=NOW - 3640 * DAY)
    facts = replace(facts, authority=one_certificate(old.certificate))

    soon = judge_dates(facts, NOW)
    assert soon.verdict is Verdict.WARN
    assert soon.text.startswith("the certificate of the project's authority expires on")
    late = judge_dates(facts, NOW + 11 * DAY)
    assert late.verdict is Verdict.FAIL
    assert late.text.startswith("the certificate of 'demo CA' expired on")
