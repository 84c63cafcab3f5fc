import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pytest
import trustme
from cryptography import x509

from hanse.doctor.findings import Finding, Verdict
from hanse.doctor.route import (
    EXEMPTING_VARIABLES,
    PROXY_VARIABLES,
    Handshake,
    PortFacts,
    Proxy,
    Trust,
    judge_name,
    judge_port,
    judge_proxy,
    judge_tls,
    proxy_for,
)
from hanse.errors import ProtocolError, Unauthenticated, Unreachable
from hanse.identity.authorities import Authority
from hanse.identity.certificates import new_key, one_certificate

TARGET = "fl.example.org:6007"
NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
VERIFY_EXPIRED, VERIFY_UNKNOWN_ISSUER, VERIFY_OTHER_HOST = 10, 20, 62


# The proxy ------------------------------------------------------------------------------------------------------------

PROXY = "http://127.0.0.1:{port}"
ROUTES = [
    ("localhost:9", {}, False),
    ("localhost:9", {"https_proxy": PROXY}, True),
    ("localhost:9", {"http_proxy": PROXY}, True),
    ("localhost:9", {"grpc_proxy": PROXY, "https_proxy": "http://127.0.0.1:9"}, True),
    ("localhost:9", {"HTTPS_PROXY": PROXY}, False),
    ("localhost:9", {"https_proxy": "", "http_proxy": PROXY}, False),
    ("localhost:9", {"https_proxy": "127.0.0.1:{port}"}, False),
    ("localhost:9", {"https_proxy": "socks5://127.0.0.1:{port}", "http_proxy": PROXY}, False),
    ("localhost:9", {"https_proxy": PROXY, "no_proxy": "localhost"}, False),
    ("localhost:9", {"https_proxy": PROXY, "no_proxy": "other, LOCALHOST"}, False),
    ("localhost:9", {"https_proxy": PROXY, "no_proxy": "host"}, True),
    ("localhost:9", {"https_proxy": PROXY, "no_proxy": "*"}, True),
    ("localhost:9", {"https_proxy": PROXY, "no_grpc_proxy": "other", "no_proxy": "localhost"}, True),
    ("fl.invalid:9", {"https_proxy": PROXY, "no_proxy": "invalid"}, False),
    ("fl.invalid:9", {"https_proxy": PROXY, "no_proxy": ".invalid"}, False),
    ("127.0.0.1:9", {"https_proxy": PROXY, "no_proxy": "127.0.0.0/8"}, False),
    ("127.0.0.1:9", {"https_proxy": PROXY, "no_proxy": "127.0.0.1"}, False),
    ("127.0.0.1:9", {"https_proxy": PROXY, "no_proxy": "10.0.0.0/8"}, True),
    ("[::1]:9", {"https_proxy": PROXY}, True),
]
"""Where to, with which environment, and whether through the proxy."""


@pytest.mark.parametrize(("target", "variables", "is_proxied"), ROUTES)
async def test_the_proxy_is_found_that_grpc_itself_takes(
    monkeypatch: pytest.MonkeyPatch, target: str, variables: dict[str, str], is_proxied: bool
):
    dialled = asyncio.Event()
    listener = await asyncio.start_server(lambda _, writer: (dialled.set(), writer.close()), "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        environ = {name: value.format(port=port) for name, value in variables.items()}
        for name in (*PROXY_VARIABLES, *EXEMPTING_VARIABLES):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

        await find_nobody_at(target)

    assert dialled.is_set() is is_proxied
    assert (proxy_for(target.rpartition(":")[0], environ) is not None) is is_proxied


async def find_nobody_at(target: str) -> None:
    """Return when a channel of gRPC has tried to connect to *target*, and failed."""
    async with (
        asyncio.timeout(30),
        grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            await channel.wait_for_state_change(state)


def test_a_proxys_port_and_credentials_are_what_the_variable_says_and_are_not_shown():
    proxy = proxy_for("fl.example.org", {"https_proxy": "http://ada:s%40cret@proxy.example.org"})

    assert proxy == Proxy("https_proxy", "proxy.example.org", 443, "ada:s@cret")
    assert "cret" not in repr(proxy) + str(proxy)
    finding = judge_proxy(TARGET, proxy, {})
    assert finding.verdict is Verdict.WARN
    assert finding.text.startswith("gRPC goes through http://proxy.example.org:443, as https_proxy says")


def test_a_proxys_ipv6_address_is_shown_in_brackets():
    assert str(proxy_for("fl.example.org", {"http_proxy": "http://[fd00::7]:3128"})) == "http://[fd00::7]:3128"


@pytest.mark.parametrize("value", ["http://proxy:port", "http://[::1", "http://"])
def test_a_variable_that_is_no_url_is_no_proxy_and_is_warned_of(value: str):
    environ = {"https_proxy": value}

    assert proxy_for("fl.example.org", environ) is None
    finding = judge_proxy(TARGET, None, environ)
    assert finding.verdict is Verdict.WARN
    assert finding.text.startswith("https_proxy is set, but not to 'http://host:port'")


def test_no_proxy_or_one_that_is_not_for_this_host_is_good():
    environ = {"https_proxy": "http://proxy:3128", "no_proxy": "example.org"}

    assert judge_proxy(TARGET, None, {}).text == "none"
    assert judge_proxy(TARGET, proxy_for("fl.example.org", environ), environ).text == (
        "none for this host, as no_proxy says"
    )


# Name and port --------------------------------------------------------------------------------------------------------


def test_a_name_is_told_with_its_addresses():
    assert judge_name(TARGET, "fl.example.org", ("10.0.0.7", "10.0.0.8"), "").text == (
        "fl.example.org is 10.0.0.7, 10.0.0.8"
    )
    assert judge_name("[::1]:6007", "[::1]", ("::1",), "").text == "::1 is an address"


def test_a_name_without_addresses_says_what_to_look_at():
    finding = judge_name(TARGET, "fl.example.org", (), "Name or service not known")

    assert isinstance(finding.error, Unreachable)
    assert finding.text == (
        "cannot reach fl.example.org:6007: the name 'fl.example.org' was not resolved (Name or service not known); "
        "check 'servers' in settings.toml, and this machine's DNS"
    )


def test_a_port_is_open_if_one_address_takes_connections():
    facts = PortFacts(("127.0.0.1",), {"::1": "connection refused"})

    assert judge_port(TARGET, facts, None).text == "open at 127.0.0.1 (not ::1: connection refused)"
    through = judge_port(TARGET, PortFacts(("10.0.0.1",)), Proxy("https_proxy", "proxy", 3128))
    assert through.text == "open at 10.0.0.1 through http://proxy:3128"


def test_a_port_that_no_address_opens_says_why_and_what_to_look_at():
    facts = PortFacts((), {"10.0.0.7": "no answer in time", "10.0.0.8": "connection refused"})
    finding = judge_port(TARGET, facts, None)

    assert isinstance(finding.error, Unreachable)
    assert finding.text == (
        "cannot reach fl.example.org:6007: 10.0.0.7: no answer in time, 10.0.0.8: connection refused; "
        "check that the server runs, its port, and firewalls between"
    )
    assert judge_port(TARGET, facts, Proxy("https_proxy", "proxy", 3128)).text.endswith(
        "check the proxy http://proxy:3128"
    )


# TLS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("demo", now=NOW - 300 * DAY)


@pytest.fixture(scope="module")
def trust(authority: Authority) -> Trust:
    return Trust("demo", authority.certificate, authority.certificate)


def certificate_of(authority: Authority, *, made: datetime = NOW, role: str = "server") -> x509.Certificate:
    hosts = ["fl.example.org", "10.0.0.7"] if role == "server" else []
    pem = authority.issue(
        name="server", organisation="Org", role=role, public_key=new_key().public_key(), now=made, hosts=hosts
    )
    return one_certificate(pem)


@pytest.fixture(scope="module")
def shown(authority: Authority) -> Handshake:
    return Handshake(certificate_of(authority), "TLSv1.3")


def refused(finding: Finding) -> str:
    assert isinstance(finding.error, Unauthenticated)
    return finding.text


def test_tls_is_told_with_its_version_and_the_certificates_end(shown: Handshake, trust: Trust):
    finding = judge_tls(TARGET, shown, trust, NOW)

    assert finding.verdict is Verdict.OK
    assert finding.text == "TLSv1.3, the certificate of 'server' by 'demo CA', valid until 2030-12-27 12:00 UTC"


def test_a_servers_certificate_that_ends_soon_is_a_warning(shown: Handshake, trust: Trust):
    finding = judge_tls(TARGET, shown, trust, NOW + 350 * DAY)

    assert finding.verdict is Verdict.WARN
    assert finding.text.endswith("in 10 days: it needs a new one")


@pytest.mark.parametrize("distrust", [0, VERIFY_EXPIRED])
def test_a_servers_certificate_out_of_date_is_told_with_its_dates_and_the_time_here(
    shown: Handshake, trust: Trust, distrust: int
):
    late = judge_tls(TARGET, replace(shown, distrust=distrust, words="certificate has expired"), trust, NOW + 400 * DAY)

    assert refused(late) == (
        "the certificate of the server at fl.example.org:6007 is valid from 2030-01-01 11:00 to 2030-12-27 12:00 UTC, "
        "and it is 2031-02-05 12:00 UTC by this machine's clock; if that is right, the server needs a new one"
    )
    assert "valid from 2030-01-01 11:00" in refused(judge_tls(TARGET, shown, trust, NOW - DAY))


def test_a_certificate_that_only_tls_takes_for_expired_means_that_the_clocks_differ(shown: Handshake, trust: Trust):
    odd = judge_tls(TARGET, replace(shown, distrust=VERIFY_EXPIRED, words="certificate has expired"), trust, NOW)

    assert refused(odd).endswith("is not good: certificate has expired; compare clocks")


def test_a_certificate_for_another_host_says_for_which_it_is_good(shown: Handshake, trust: Trust):
    finding = judge_tls(TARGET, replace(shown, distrust=VERIFY_OTHER_HOST, words="Hostname mismatch"), trust, NOW)

    assert "is good for 10.0.0.7, fl.example.org, server; dial it by one of these" in refused(finding)


@pytest.mark.parametrize(
    ("project", "words"),
    [("demo", "an earlier authority of project 'demo'"), ("rival", "another project's authority, of project 'rival'")],
)
def test_a_server_of_another_authority_is_told_from_a_proxy(trust: Trust, project: str, words: str):
    other = certificate_of(Authority.create(project, now=NOW))
    stranger = Handshake(
        other, "TLSv1.3", distrust=VERIFY_UNKNOWN_ISSUER, words="unable to get local issuer certificate"
    )

    assert f"has a certificate of {words}; it and this kit need" in refused(judge_tls(TARGET, stranger, trust, NOW))


@pytest.fixture(scope="module")
def proxys() -> trustme.CA:
    return trustme.CA(organization_name="Hospital Proxy")


@pytest.fixture(scope="module")
def at_proxy(proxys: trustme.CA) -> Handshake:
    leaf = proxys.issue_cert("fl.example.org", not_after=NOW + 100 * DAY)
    certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
    return Handshake(certificate, "TLSv1.2", distrust=VERIFY_UNKNOWN_ISSUER, words="unable to get local issuer")


def test_a_proxy_that_ends_tls_unexpectedly_is_called_that(at_proxy: Handshake, trust: Trust):
    text = refused(judge_tls(TARGET, at_proxy, trust, NOW))

    assert text.startswith("what answers at fl.example.org:6007 shows the certificate of 'fl.example.org'")
    assert "Hospital Proxy" in text
    assert "a proxy ends TLS on the way; have it pass the connection on, or name its authority in tls_roots" in text


def test_a_proxy_that_the_settings_expect_is_good(at_proxy: Handshake, trust: Trust, proxys: trustme.CA):
    expecting = replace(trust, roots=proxys.cert_pem.bytes())
    finding = judge_tls(TARGET, replace(at_proxy, distrust=0), expecting, NOW)

    assert finding.verdict is Verdict.OK
    assert finding.text.endswith("a proxy ends TLS here, as tls_roots says")


def test_a_proxy_that_the_settings_expect_and_that_is_not_there_is_found(
    shown: Handshake, trust: Trust, proxys: trustme.CA
):
    expecting = replace(trust, roots=proxys.cert_pem.bytes())
    finding = judge_tls(TARGET, replace(shown, distrust=VERIFY_UNKNOWN_ISSUER), expecting, NOW)

    assert "no proxy ends TLS here, so take tls_roots out of settings.toml" in refused(finding)


def test_another_proxy_than_the_settings_expect_is_a_stranger(at_proxy: Handshake, trust: Trust):
    expecting = replace(trust, roots=trustme.CA().cert_pem.bytes())

    assert "a proxy ends TLS on the way" in refused(judge_tls(TARGET, at_proxy, expecting, NOW))


def test_a_server_that_closes_after_the_handshake_does_not_take_the_certificate(shown: Handshake, trust: Trust):
    finding = judge_tls(TARGET, replace(shown, refusal="it closed the connection"), trust, NOW)

    assert "does not take this kit's certificate (it closed the connection); check its dates" in refused(finding)


def test_what_speaks_no_http2_is_no_server(shown: Handshake, trust: Trust):
    finding = judge_tls(TARGET, replace(shown, is_http2=False, refusal="it closed the connection"), trust, NOW)

    assert isinstance(finding.error, ProtocolError)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("wrong version number", "what listens there does not speak TLS"),
        ("no answer in time", "the TLS handshake failed (no answer in time)"),
    ],
)
def test_a_handshake_that_did_not_come_about_says_how(trust: Trust, failure: str, words: str):
    finding = judge_tls(TARGET, Handshake(failure=failure), trust, NOW)

    assert isinstance(finding.error, Unreachable)
    assert finding.text == (
        f"cannot reach fl.example.org:6007: {words}; check that it is the server's port, and 'tls' in its settings"
    )


def test_tls_without_a_certificate_is_none(trust: Trust):
    assert judge_tls(TARGET, Handshake(), trust, NOW).verdict is Verdict.FAIL
