from mochi_core.config import MOCHI_1, TINY
from mochi_core.text.t5 import empty_t5


def test_the_network_has_the_numbers_of_its_config():
    network = empty_t5(TINY.text)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["shared.weight"] == (200, 64)
    assert shapes["encoder.block.1.layer.1.DenseReluDense.wi_0.weight"] == (128, 64)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


def test_t5_v1_1_xxl():
    network = empty_t5(MOCHI_1.text)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_762_310_656
