"""The comparison with PyTorch: its flags, its table at the smallest size, and that both sides are the same networks."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from lvae_jax import networks

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--networks=imagenet", "--networks: unknown imagenet: give some of toy, mnist, celeba, smoke"),
        ("--peers=tensorflow", "--peers: unknown tensorflow: give some of lvae_jax, PyTorch"),
        ("--rounds=0", "--rounds and --blocks must be at least 1"),
        ("--json=/nowhere/at/all.json", "--json: there is no folder /nowhere/at"),
    ],
)
def test_bad_flags_are_one_line(capsys, flag, message):
    with pytest.raises(SystemExit) as stopped:
        peers.main([flag])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_networks_that_differ_are_not_compared(monkeypatch):
    counts = iter([10, 11])
    monkeypatch.setattr(peers, "in_process", lambda *arguments: peers.Measurement(next(counts), 1.0, [1.0]))
    with pytest.raises(SystemExit, match=r"differ in their numbers of parameters: \{'lvae_jax': 10, 'PyTorch': 11\}"):
        peers.compare("smoke", ["lvae_jax", "PyTorch"], rounds=1, num_blocks=1)


def test_ratios_are_of_one_round():
    ours = [peers.Measurement(7, 1.0, [2.0, 4.0, 3.0], 3e6), peers.Measurement(7, 3.0, [6.0], 3e6)]
    theirs = [peers.Measurement(7, 5.0, [9.0]), peers.Measurement(7, 5.0, [12.0])]
    lines = peers.rows("toy", {peers.OURS: ours, "PyTorch": theirs}, rate=1e10)
    assert lines[0][2:] == ["4.5 (3.0 to 6.0)", "1.00 (1.00 to 1.00)", "7%", "2.0 (1.0 to 3.0)"]
    assert lines[1][2:] == ["10.5 (9.0 to 12.0)", "2.50 (2.00 to 3.00)", "3%", "5.0 (5.0 to 5.0)"]


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    names = list(peers.PEERS) if HAS_TORCH else [peers.OURS]
    path = tmp_path / "peers.json"
    peers.main(["--networks=smoke", f"--peers={';'.join(names)}", "--rounds=2", "--blocks=2", f"--json={path}"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| smoke")]
    assert [line.split(" | ")[1] for line in table] == names
    kept = json.loads(path.read_text())
    for peer in names:
        for one in kept["measured"]["smoke"][peer]:
            assert len(one["steps"]) == 2
            assert 0.0 < min(one["steps"]) < 1e3 * one["first"]


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed: pip install -e '.[bench]'")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_the_networks_are_the_same_functions():
    import torch

    from benchmarks import torch_vae

    shape, options = (5, 7, 3), {"widths": (4,), "num_blocks": 1}
    vae = torch_vae.learned_scalar_vae(shape, 2, **options)
    decoder = networks.conv_decoder(shape, 1, 2, **options)
    params = decoder.init(jax.random.key(0))["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    blocks = params["_ResidualConvolutions_0"]
    with torch.no_grad():
        start = np.asarray(params["Dense_0"]["kernel"]).reshape(2, 3, 4, 4).transpose(3, 1, 2, 0)
        vae.decoder.start.weight.copy_(torch.from_numpy(start.reshape(-1, 2).copy()))
        bias = np.asarray(params["Dense_0"]["bias"]).reshape(3, 4, 4).transpose(2, 0, 1)
        vae.decoder.start.bias.copy_(torch.from_numpy(bias.reshape(-1).copy()))
        for layer, name in ((vae.decoder.blocks[0].first, "Conv_0"), (vae.decoder.blocks[0].second, "Conv_1")):
            layer.weight.copy_(torch.from_numpy(np.asarray(blocks[name]["kernel"]).transpose(3, 2, 0, 1).copy()))
            layer.bias.copy_(torch.from_numpy(np.array(blocks[name]["bias"])))
        up = params["ConvTranspose_0"]
        kernel = np.asarray(up["kernel"])[::-1, ::-1].transpose(2, 3, 0, 1)
        vae.decoder.up[0].weight.copy_(torch.from_numpy(kernel.copy()))
        vae.decoder.up[0].bias.copy_(torch.from_numpy(np.array(up["bias"])))
        z = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
        theirs = vae.decoder(torch.from_numpy(z)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(decoder.apply({"params": params}, jnp.asarray(z))[..., 0], theirs, rtol=1e-4, atol=1e-4)
