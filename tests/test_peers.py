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


def loaded(layer, params, *axes):
    """Puts our kernel, whose axes turn to `axes`, and our bias into a layer of PyTorch."""
    import torch

    kernel = np.asarray(params["kernel"])
    for parameter, value in ((layer.weight, kernel.transpose(axes)), (layer.bias, np.asarray(params["bias"]))):
        parameter.data = torch.from_numpy(value.copy())


def drawn(network):
    """Random parameters of ours, of which none is zero."""
    params = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 3, params)


@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed: pip install -e '.[bench]'")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_the_networks_are_the_same_functions():
    """Images have odd sides: where they are even, flax pads on one side what PyTorch pads on the other."""
    import torch

    from benchmarks import torch_vae

    def assert_same(ours, theirs):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)

    x = np.random.default_rng(0).normal(size=(6, 5, 7, 3)).astype(np.float32)
    z = x[:, 0, 0, :2].copy()
    options = {"widths": (4,), "num_blocks": 1}
    vae = torch_vae.learned_scalar_vae((5, 7, 3), 2, **options)
    conv, tail = (3, 2, 0, 1), (2, 3, 0, 1)

    encoder = networks.conv_encoder((5, 7, 3), 2, **options)
    params = drawn(encoder)
    layers, blocks = params["params"], params["params"]["_ResidualConvolutions_0"]
    loaded(vae.encoder[0], layers["Conv_0"], *conv)
    loaded(vae.encoder[2].first, blocks["Conv_0"], *conv)
    loaded(vae.encoder[2].second, blocks["Conv_1"], *conv)
    by_channel = layers["Dense_0"]["kernel"].reshape(3, 4, 4, 4).transpose(2, 0, 1, 3).reshape(48, 4)
    loaded(vae.encoder[-1], {"kernel": by_channel, "bias": layers["Dense_0"]["bias"]}, 1, 0)
    theirs = vae.encoder(torch.from_numpy(x).permute(0, 3, 1, 2))
    mean, _ = encoder.apply(params, jnp.asarray(x))
    assert_same(mean, theirs[:, :2])

    decoder = networks.conv_decoder((5, 7, 3), 1, 2, **options)
    params = drawn(decoder)
    layers, blocks = params["params"], params["params"]["_ResidualConvolutions_0"]
    start = {name: leaf.reshape(-1, 3, 4, 4).transpose(0, 3, 1, 2) for name, leaf in layers["Dense_0"].items()}
    loaded(vae.decoder.start, {"kernel": start["kernel"].reshape(2, 48), "bias": start["bias"].reshape(48)}, 1, 0)
    loaded(vae.decoder.blocks[0].first, blocks["Conv_0"], *conv)
    loaded(vae.decoder.blocks[0].second, blocks["Conv_1"], *conv)
    up = layers["ConvTranspose_0"]
    loaded(vae.decoder.up[0], {"kernel": up["kernel"][::-1, ::-1], "bias": up["bias"]}, *tail)
    theirs = vae.decoder(torch.from_numpy(z)).permute(0, 2, 3, 1)
    assert_same(decoder.apply(params, jnp.asarray(z))[..., 0], theirs)

    points = torch_vae.mlp(2, 3, width=5, num_blocks=1)
    ours = networks.mlp_decoder((3,), 1, 2, width=5, num_blocks=1)
    params = drawn(ours)
    for index, layer in enumerate((points[0], points[1].first, points[1].second, points[-1])):
        loaded(layer, params["params"][f"Dense_{index}"], 1, 0)
    assert_same(ours.apply(params, jnp.asarray(z))[..., 0], points(torch.from_numpy(z)))
