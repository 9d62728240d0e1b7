"""Tell what cards can do, and how long a step takes on one, roughly. Pure arithmetic.

A step takes as long as its operations at the share of the card's peak that was measured elsewhere (docs/speed.md), or
as long as its memory needs to be read. It is an estimate, good to a factor of two at best: docs/planning.md.
"""

from dataclasses import dataclass

CHECKPOINTED = 4 / 3
"""Operations of an update whose layers are computed again: three passes become four."""


@dataclass(frozen=True)
class Card:
    """Hold what a card can do, as its maker says.

    Attributes:
        name: for people.
        memory: bytes.
        half, single: floating-point operations a second, of dense products in bfloat16 and in fp32.
        bandwidth: bytes of its memory that are read a second.
        update_share: of these operations, that an update gets.
        sampling_share: of these operations, that sampling gets.
        decoding_step: seconds of a step of decoding beside what is read and computed.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    update_share: float = 0.35
    sampling_share: float = 0.35
    decoding_step: float = 0.008

    def rate(self, number: int) -> float:
        """Return the operations a second of products of numbers of so many bytes."""
        return self.half if number <= 2 else self.single


CARDS = {
    "a100": Card("A100 80GB SXM", 80e9, 312e12, 19.5e12, 2.039e12),
    "h100": Card("H100 SXM", 80e9, 989e12, 67e12, 3.35e12),
    "h200": Card("H200 SXM", 141e9, 989e12, 67e12, 4.8e12),
    "l40s": Card("L40S", 48e9, 362e12, 91.6e12, 0.864e12),
    "rtx4090": Card("GeForce RTX 4090", 24e9, 165e12, 82.6e12, 1.008e12),
}
"""Cards by name. The numbers are those of NVIDIA's data sheets, and for the RTX 4090 of NVIDIA's paper on the Ada
architecture. Shares and step are those of an H100 and an H200: 343 of 989 TFLOP/s in the update of a model of 1.7 B
parameters, and .77 to .80 s for 96 tokens of models that are read in a fraction of that time (docs/speed.md)."""


def of_this_cpu(memory: float, rate: float, is_bf16: bool) -> Card:
    """Return this machine as a card.

    Args:
        memory: bytes.
        rate: operations a second of products of large matrices, as bae.training.flops.matmul_rate measures it.
        is_bf16: whether the weights are bfloat16. The share of the update was .6 to .7 in fp32, and .16 to .20 in
            bfloat16, whose products are so much faster than the rest (docs/speed.md).
    """
    # Sampling: 172 tokens a second of SmolLM2-135M, about 50 of 140 GFLOP/s.
    return Card("this machine", memory, rate, rate, float("inf"), 0.2 if is_bf16 else 0.6, 0.35, 0.0)


def update_seconds(card: Card, flops: float, product: int, checkpointing: bool) -> float:
    """Return the seconds of an update.

    Args:
        card: that does it.
        flops: operations, as bae.training.flops.update_flops counts them.
        product: bytes of a number in the products.
        checkpointing: whether layers are computed again.
    """
    return flops * (CHECKPOINTED if checkpointing else 1) / (card.rate(product) * card.update_share)


def sampling_seconds(card: Card, flops: float, number: int, steps: int, read: float) -> float:
    """Return the seconds of sampling: of its operations or of reading, whichever take longer, and of its steps.

    Args:
        card: that does it.
        flops: operations, as bae.training.flops.decoding_flops counts them.
        number: bytes of a weight.
        steps: of decoding.
        read: bytes that a step reads: weights, keys and values.
    """
    computed = flops / (card.rate(number) * card.sampling_share)
    return max(computed, steps * read / card.bandwidth) + steps * card.decoding_step
