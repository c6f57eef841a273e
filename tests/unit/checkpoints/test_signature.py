"""Ed25519 signatures: the vectors of RFC 8032, and what is refused with and without keys."""

import base64
import os
import shutil
import subprocess
import sys

import pytest

from tunesmith.checkpoints.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    hash_files,
    read_manifest,
    verify,
    verify_sizes,
    write_manifest,
)
from tunesmith.checkpoints.remote import upload_checkpoint
from tunesmith.checkpoints.signature import (
    SIGNING_KEY,
    VERIFY_KEY,
    carry_signature,
    check_keys,
    check_signature,
    sign,
    signature_of,
)
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.models.servable import verified_manifest

# RFC 8032, section 7.1, test 3.
SEED = "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7"
PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
MESSAGE = b"\xaf\x82"
SIGNATURE = bytes.fromhex(
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


def pem(label, der):
    return f"-----BEGIN {label}-----\n{base64.b64encode(der).decode()}\n-----END {label}-----\n"


def private_pem(seed):
    """PKCS #8 of an Ed25519 key (RFC 8410, section 7): a fixed head and the 32 bytes."""
    return pem("PRIVATE KEY", bytes.fromhex("302e020100300506032b657004220420" + seed))


def public_pem(public):
    return pem("PUBLIC KEY", bytes.fromhex("302a300506032b6570032100" + public))


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Both halves of the RFC's key in files; ``keys("sign")``, ``keys("verify")`` configure one of them."""
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "signing.pem").write_text(private_pem(SEED))
    (folder / "verify.pem").write_text(public_pem(PUBLIC))
    for name in (SIGNING_KEY, VERIFY_KEY):
        monkeypatch.delenv(name, raising=False)

    def configure(*halves):
        for name, half, file in ((SIGNING_KEY, "sign", "signing.pem"), (VERIFY_KEY, "verify", "verify.pem")):
            if half in halves:
                monkeypatch.setenv(name, str(folder / file))
            else:
                monkeypatch.delenv(name, raising=False)

    configure.folder = folder
    return configure


@pytest.fixture
def checkpoint(tmp_path, tools):
    def save(name="step-000120"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"abc")
        write_manifest(folder, tools.manifest(hash_files(folder)))
        return folder

    return save


def test_the_signature_is_that_of_the_rfc(tmp_path, keys):
    keys("sign", "verify")
    file = tmp_path / "message"
    file.write_bytes(MESSAGE)
    sign(file)
    line = signature_of(file).read_text()
    assert line.endswith("\n")
    assert base64.b64decode(line) == SIGNATURE
    check_signature(file, MESSAGE)


def test_openssl_accepts_the_signature_of_a_manifest(tmp_path, keys, checkpoint):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl command")
    keys("sign")
    folder = checkpoint()
    (tmp_path / "raw").write_bytes(base64.b64decode((folder / SIGNATURE_NAME).read_bytes()))
    command = [openssl, "pkeyutl", "-verify", "-pubin", "-inkey", str(keys.folder / "verify.pem"), "-rawin"]
    files = ["-in", str(folder / MANIFEST_NAME), "-sigfile", str(tmp_path / "raw")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    if "nknown option" in done.stderr:
        pytest.skip("this openssl is too old for Ed25519")
    assert "Verified Successfully" in done.stdout


def test_the_signature_is_no_part_of_the_listed_files(keys, checkpoint):
    keys("sign")
    folder = checkpoint()
    assert (folder / SIGNATURE_NAME).is_file()
    assert SIGNATURE_NAME == "tunesmith.json.sig"
    assert list(hash_files(folder)) == ["adapter_model.safetensors"]
    verify_sizes(folder, read_manifest(folder))
    keys("verify")
    assert verify(folder).step == 120
    assert verified_manifest(folder) == read_manifest(folder)


def test_a_manifest_may_not_list_its_signature(keys, checkpoint):
    keys("sign")
    folder = checkpoint()
    file = folder / MANIFEST_NAME
    file.write_text(file.read_text().replace('"adapter_model.safetensors"', f'"{SIGNATURE_NAME}"'))
    with pytest.raises(CheckpointError, match=r"'tunesmith\.json\.sig' is no file name within a checkpoint"):
        read_manifest(folder)


def test_without_keys_nothing_is_signed_and_anything_is_read(keys, checkpoint):
    folder = checkpoint()
    assert not (folder / SIGNATURE_NAME).exists()
    verify(folder)
    (folder / SIGNATURE_NAME).write_text("nonsense")
    verify(folder)


def test_an_unsigned_checkpoint_is_refused_where_a_key_is_configured(keys, checkpoint):
    folder = checkpoint()
    keys("verify")
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{folder}: is not signed (no tunesmith.json.sig in it), and TUNESMITH_VERIFY_KEY asks for signatures; "
        "use a checkpoint signed by that key, or unset TUNESMITH_VERIFY_KEY"
    )


def test_taking_the_manifest_away_does_not_help(keys, checkpoint):
    keys("sign")
    folder = checkpoint()
    (folder / MANIFEST_NAME).unlink()
    assert verified_manifest(folder) is None
    keys("verify")
    with pytest.raises(CheckpointError, match=r"is not signed \(no tunesmith\.json in it\)"):
        verified_manifest(folder)


def test_any_change_of_the_manifest_is_refused(keys, checkpoint):
    keys("sign", "verify")
    folder = checkpoint()
    file = folder / MANIFEST_NAME
    file.write_text(file.read_text().replace('"step": 120', '"step": 121'))
    assert read_manifest(folder).step == 121
    with pytest.raises(CheckpointError, match=r"its tunesmith\.json was changed, or signed by another key"):
        verify(folder)


def test_a_changed_weight_is_refused_as_without_a_signature(keys, checkpoint):
    keys("sign", "verify")
    folder = checkpoint()
    (folder / "adapter_model.safetensors").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match="its content is not what was saved"):
        verify(folder)


def test_another_key_is_refused(keys, checkpoint):
    (keys.folder / "signing.pem").write_text(private_pem("11" * 32))
    keys("sign", "verify")
    folder = checkpoint()
    with pytest.raises(CheckpointError, match="signed by another key"):
        verify(folder)


@pytest.mark.parametrize("content", [b"", b"nonsense!", b"\xff\xfe", base64.b64encode(b"short")])
def test_what_is_no_signature_is_refused(keys, checkpoint, content):
    keys("sign", "verify")
    folder = checkpoint()
    (folder / SIGNATURE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as a signature|was changed, or signed"):
        verify(folder)


def test_a_manifest_written_again_without_a_key_loses_the_old_signature(keys, checkpoint, tools):
    keys("sign")
    folder = checkpoint()
    keys()
    write_manifest(folder, tools.manifest(hash_files(folder), eval_loss=0.5))
    assert not (folder / SIGNATURE_NAME).exists()


def test_an_equal_copy_gets_the_signature_and_another_does_not(tmp_path, keys, checkpoint, tools):
    keys("sign")
    source = checkpoint()
    equal, other = tmp_path / "equal", tmp_path / "other"
    for copy in (equal, other):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.sig"))
    keys("verify")
    (other / MANIFEST_NAME).write_text((other / MANIFEST_NAME).read_text() + "\n")
    for copy in (equal, other):
        carry_signature(source / MANIFEST_NAME, copy / MANIFEST_NAME)
    verify(equal)
    assert not (other / SIGNATURE_NAME).exists()


def test_an_upload_carries_the_signature_and_replaces_an_older_one(tmp_path, keys, checkpoint):
    keys("sign")
    folder = checkpoint()
    root = f"file://{tmp_path / 'bucket'}"
    there = tmp_path / "bucket" / "tag"
    there.mkdir(parents=True)
    upload_checkpoint(folder, root, "tag")
    keys("verify")
    assert verify(there) == read_manifest(folder)
    keys()
    upload_checkpoint(checkpoint("unsigned"), root, "tag")
    assert sorted(path.name for path in there.iterdir()) == ["adapter_model.safetensors", MANIFEST_NAME]


# --- keys that cannot be used


def test_a_key_put_into_the_environment_itself_is_not_repeated(monkeypatch, keys, checkpoint):
    base64_of_it = base64.b64encode(bytes.fromhex(SEED)).decode()
    for value in (private_pem(SEED), SEED, base64_of_it, "~nobody/x", "a\nb"):
        monkeypatch.setenv(SIGNING_KEY, value)
        with pytest.raises(ConfigError) as caught:
            check_keys()
        assert str(caught.value) == (
            "TUNESMITH_SIGNING_KEY: names no file; give the path of a PEM file, not the key itself"
        )


@pytest.mark.parametrize("variable", [SIGNING_KEY, VERIFY_KEY])
@pytest.mark.parametrize("content", ["", "nonsense", pem("PRIVATE KEY", b"123"), pem("PUBLIC KEY", b"123")])
def test_a_file_that_is_no_such_key_is_refused(monkeypatch, keys, variable, content):
    file = keys.folder / "bad.pem"
    file.write_text(content)
    monkeypatch.setenv(variable, str(file))
    half = "private" if variable == SIGNING_KEY else "public"
    with pytest.raises(ConfigError, match=f"{variable}: names a file that is no Ed25519 {half} key in PEM"):
        check_keys()


def test_the_halves_must_not_be_exchanged(monkeypatch, keys):
    monkeypatch.setenv(SIGNING_KEY, str(keys.folder / "verify.pem"))
    with pytest.raises(ConfigError, match="no Ed25519 private key"):
        check_keys()
    monkeypatch.delenv(SIGNING_KEY)
    monkeypatch.setenv(VERIFY_KEY, str(keys.folder / "signing.pem"))
    with pytest.raises(ConfigError, match="no Ed25519 public key"):
        check_keys()


def test_a_key_of_another_kind_or_with_a_password_is_refused(monkeypatch, keys):
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    file = keys.folder / "other.pem"
    monkeypatch.setenv(SIGNING_KEY, str(file))
    other = generate_private_key(SECP256R1())
    file.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="no Ed25519 private key"):
        check_keys()
    locked = BestAvailableEncryption(b"x")
    file.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match="names a key file with a password"):
        check_keys()


def test_a_run_whose_checkpoints_would_be_refused_is_known_before_it_starts(keys):
    check_keys()
    keys("sign")
    check_keys()
    keys("sign", "verify")
    check_keys()
    keys("verify")
    with pytest.raises(ConfigError, match=f"^{VERIFY_KEY}: asks for signatures, and this run would leave"):
        check_keys()
    (keys.folder / "signing.pem").write_text(private_pem("22" * 32))
    keys("sign", "verify")
    with pytest.raises(ConfigError, match=f"^{VERIFY_KEY}: is not the public key of {SIGNING_KEY}"):
        check_keys()


def test_a_missing_package_is_said_with_its_remedy(monkeypatch, keys):
    keys("sign")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError) as caught:
        check_keys()
    assert str(caught.value) == (
        f"{SIGNING_KEY}: is set, but cryptography is not installed; run: pip install 'tunesmith[sign]'"
    )


def test_a_key_that_may_not_be_read_is_named(monkeypatch, as_ordinary_user, keys):
    secret = as_ordinary_user / "secret.pem"
    secret.write_text(private_pem(SEED))
    secret.chmod(0o600)
    monkeypatch.setenv(SIGNING_KEY, str(secret))
    os.seteuid(65534)
    with pytest.raises(ConfigError, match=r"secret\.pem cannot be read \(Permission denied\)"):
        check_keys()
