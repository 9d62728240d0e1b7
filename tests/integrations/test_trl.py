"""TRL's trainer with an advantage for each token, equal to what a training step of this project writes."""

from types import SimpleNamespace

import pytest
import torch

from bae.batch import Problem, RolloutBatch
from bae.callbacks import BlockwiseAdvantages
from bae.integrations.blockwise import Blockwise
from bae.method import normalisation
from bae.method.advantages import spread_over_tokens
from bae.method.baselines import group_mean, outcome_conditioned, without_self
from bae.method.losses import block_mean, blockwise_clipped_loss, log_probs_and_entropy
from bae.objectives.outcomes import given_reward
from bae.objectives.rao_blackwell import RaoBlackwell
from bae.training.forward import completion_logits
from bae.training.policy import load_pretrained
from tests.callbacks.test_writers import TEXTS
from tests.fidelity.test_continuations import make_pipeline

trl = pytest.importorskip("trl", reason="make peers installs TRL")
pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")

PLAIN = {"objective": normalisation.none, "block": normalisation.none}
ROWS = [{"prompt": question, "answer": "3"} for question in ("1+2=", "2+1=") for _ in range(4)]


def trainer(policy, folder, rows, blockwise, **options):
    from datasets import Dataset

    from bae.integrations.trl import BlockwiseGRPOTrainer

    rollout = options.pop("rollout", None)
    settings = trl.GRPOConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", num_generations=4, per_device_train_batch_size=8,
        max_completion_length=48, save_strategy="no", **options,
    )  # fmt: skip
    return BlockwiseGRPOTrainer(
        policy.model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=policy.tokenizer,
        rollout_func=rollout and (lambda *_: rollout), blockwise=blockwise,
    )  # fmt: skip


def test_advantages_are_those_of_a_training_step(tmp_path):
    policy = load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")
    pipeline, eos = make_pipeline(policy), policy.tokenizer.eos_token_id
    ids = [[*policy.tokenizer.encode(text, add_special_tokens=False), eos] for text in TEXTS]
    prompts = [policy.tokenizer.encode(row["prompt"]) for row in ROWS]
    rollout = {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None}
    theirs = trainer(policy, tmp_path, ROWS, Blockwise(pipeline.scorer), rollout=rollout)
    policy.model.train()
    output = theirs._generate_and_score_completions([dict(row) for row in ROWS])

    from bae.integrations.trl import sampled_tokens

    samples = sampled_tokens(output, [eos])
    assert samples.ended.all() and samples.completion_mask.sum(1).tolist() == [len(each) for each in ids]
    problems = [Problem(row["prompt"], row["prompt"], row["answer"]) for row in ROWS]
    scored = pipeline.scorer(problems, samples)
    batch = RolloutBatch(0, problems[::4], 4, samples, scored)
    weigh = BlockwiseAdvantages(pipeline, outcome_conditioned, group_mean, without_self, given_reward, PLAIN, 0)
    weigh.on_train_batch_start(SimpleNamespace(world_size=1, global_rank=0), None, batch, 0)
    ours = spread_over_tokens(batch.advantages.per_block, scored.block_of)
    assert output["advantages"].equal(ours) and ours.unique().numel() > 4


def test_the_loss_of_trl_is_ours(tmp_path):
    """With loss_type=grpo, a mean over the tokens of each completion, and block_mean put into the advantages."""
    policy = load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")
    pipeline, eos = make_pipeline(policy), policy.tokenizer.eos_token_id
    ids = [[*policy.tokenizer.encode(text, add_special_tokens=False), eos] for text in TEXTS]
    prompts = [policy.tokenizer.encode(row["prompt"]) for row in ROWS]
    rollout = {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None}
    blockwise = Blockwise(pipeline.scorer, aggregation=block_mean)
    theirs = trainer(policy, tmp_path, ROWS, blockwise, rollout=rollout, loss_type="grpo", num_iterations=2)
    theirs.current_gradient_accumulation_steps = 1  # as train() has it
    policy.model.train()
    output = theirs._generate_and_score_completions([dict(row) for row in ROWS])
    with torch.no_grad():  # away from the policy that sampled, so that ratios are not all 1
        for n, weight in enumerate(policy.model.parameters()):
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(n)))

    from bae.integrations.trl import sampled_tokens

    samples = sampled_tokens(output, [eos])
    problems = [Problem(row["prompt"], row["prompt"], row["answer"]) for row in ROWS]
    advantages, scored = Blockwise(pipeline.scorer)(problems, samples, 4)
    logits, _ = completion_logits(policy.model, samples, torch.arange(len(ROWS)))
    log_p, _ = log_probs_and_entropy(logits, samples.completion_ids, 1.0)
    weights = block_mean(scored.block_of, torch.ones(2), torch.ones(2))
    old = output["old_per_token_logps"]
    ours = blockwise_clipped_loss(log_p, old, advantages, weights, theirs.args.epsilon, theirs.args.epsilon)
    losses = ours, theirs.compute_loss(policy.model, output)
    torch.testing.assert_close(*losses)
    parameters = list(policy.model.parameters())
    mine, others = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses)
    assert mine.abs().max() > 1e-3
    torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-5 * float(others.abs().max()))


def test_two_steps_are_trained(tmp_path):
    policy = load_pretrained("package://assets/tiny", dtype="float32", prompt_template="{question}")
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    rows = [{"prompt": f"{a}+{a + 1}=", "answer": str(2 * a + 1)} for a in range(1, 9)]
    blockwise = Blockwise(make_pipeline(policy).scorer)
    running = trainer(policy, tmp_path, rows, blockwise, max_steps=2, learning_rate=1e-3, logging_steps=1)
    running.train()
    logged = [entry for entry in running.state.log_history if "rewards/correctness/mean" in entry]
    assert len(logged) == 2 and all(0 <= entry["rewards/correctness/mean"] <= 1 for entry in logged)
    assert all(entry["grad_norm"] > 0 for entry in logged)
    assert any(not weight.equal(before[name]) for name, weight in policy.model.named_parameters())


def test_what_cannot_work_is_refused(tiny):
    scorer = make_pipeline(tiny).scorer
    with pytest.raises(ValueError, match="baseline: it is finished in this project's own training pass"):
        Blockwise(scorer, baseline=RaoBlackwell.__new__(RaoBlackwell))
    with pytest.raises(ValueError, match="6 completions are not whole groups of 4"):
        Blockwise(scorer)([Problem("p", "1+2=", "3")] * 6, None, 4)
