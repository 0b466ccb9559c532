"""The checks, the most telling first: where one fails, the later ones mean little.

Attention first, because everything else goes through it; then the learner; then the sampler that needs nothing but
transformers; then several processes; then vLLM. The seconds are a GPU's, with its compilers at work for the first time.
"""

from tests.gpu.runner import Check

# name (of its function, with hyphens), module, limit and usual seconds, what it looks at
_TABLE = (
    ("imports", "bare", 240, 10, "learner, hf sampler and loop without the optional packages"),
    ("kernels", "attention", 600, 30, "flex_attention alone"),
    ("families", "attention", 600, 30, "packed passes of nine families against padded float32"),
    ("head", "learning", 180, 10, "output head, log-probs, entropies and their gradients"),
    ("updates", "learning", 300, 20, "a step with every loss"),
    ("bfloat16", "learning", 300, 20, "steps in bfloat16, compiled and not"),
    ("optimizers", "learning", 600, 20, "every optimizer, offload, tensors moved to the host"),
    ("memory", "learning", 600, 60, "planned peak against the measured one"),
    ("hf-contract", "sampling", 300, 20, "check_sampler on the hf sampler"),
    ("hf-run", "sampling", 300, 20, "a whole run with the hf sampler"),
    ("broadcast-one", "many", 120, 10, "NCCL broadcast with one rank"),
    ("ranks-one", "many", 240, 15, "FSDP2 with one rank"),
    ("broadcast-two", "many", 180, 15, "broadcast between two processes"),
    ("ranks-two", "many", 300, 20, "FSDP2 with two ranks"),
    ("vllm-engine", "sampling", 420, 30, "vLLM starts; which runner; its log-probs"),
    ("vllm-contract", "sampling", 900, 60, "check_sampler on vLLM, sleep and wake among it"),
    ("vllm-lora", "sampling", 420, 45, "adapters"),
    ("vllm-sleep", "sampling", 420, 45, "what sleep gives back"),
    ("vllm-in-flight", "sampling", 420, 45, "weights swapped under requests"),
    ("vllm-run", "sampling", 600, 60, "a whole run with vLLM"),
    ("rehearsal-8gb", "sampling", 900, 90, "the 8 GB recipe with 8 GiB free"),
)
_NOT_ON_CPU = {
    "memory": "tests/test_memory.py and tests/benchmarks/memory.py compare the two on a CPU",
    "broadcast-one": "a broadcast by gloo has two members",
    "ranks-one": "two ranks show it on a CPU",
    "vllm-lora": "tests/test_sampler_contract.py has it on a CPU",
    "vllm-sleep": "vLLM does not sleep on a CPU",
    "vllm-in-flight": "tests/test_vllm.py has it on a CPU",
    "vllm-run": "tests/test_run.py has it on a CPU",
    "rehearsal-8gb": "a CPU has no card to fill",
}
CHECKS = tuple(
    Check(
        name, f"tests.gpu.{module}:{name.replace('-', '_')}", limit_s, usual_s, what,
        needs="vllm" if name.startswith(("vllm", "rehearsal")) else "", not_on_cpu=_NOT_ON_CPU.get(name, ""),
    )
    for name, module, limit_s, usual_s, what in _TABLE
)  # fmt: skip
