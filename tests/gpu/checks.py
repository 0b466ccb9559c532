"""The checks in the order of what they decide: what fails early makes what follows it mean little.

Attention first, because everything else goes through it; then the learner; then the sampler that needs nothing but
transformers; then several processes; then vLLM. Limits are for a GPU, with its compilers at work for the first time.
"""

from tests.gpu.runner import Check

ATTENTION, LEARNING, SAMPLING, MANY = (f"tests.gpu.{name}" for name in ("attention", "learning", "sampling", "many"))

CHECKS = (
    Check("imports", f"{LEARNING}:imports", 240, 10, "learner, hf sampler and loop without the optional packages"),
    Check("kernels", f"{ATTENTION}:kernels", 600, 30, "flex_attention and variable-length attention alone"),
    Check("families", f"{ATTENTION}:families", 600, 30, "packed passes of nine families against padded float32"),
    Check("head", f"{LEARNING}:head", 180, 10, "output head, log-probs, entropies and their gradients"),
    Check("updates", f"{LEARNING}:updates", 300, 20, "a step with every loss"),
    Check("bfloat16", f"{LEARNING}:bfloat16", 300, 20, "steps in bfloat16, compiled and not"),
    Check("optimizers", f"{LEARNING}:optimizers", 600, 20, "every optimizer, offload, parked tensors"),
    Check("memory", f"{LEARNING}:memory", 600, 60, "planned peak against the measured one"),
    Check("hf-contract", f"{SAMPLING}:hf_contract", 300, 20, "check_sampler on the hf sampler"),
    Check("hf-run", f"{SAMPLING}:hf_run", 300, 20, "a whole run with the hf sampler"),
    Check("broadcast-one", f"{MANY}:broadcast_one", 120, 10, "NCCL broadcast with one rank"),
    Check("ranks-one", f"{MANY}:ranks_one", 240, 15, "FSDP2 with one rank"),
    Check("broadcast-two", f"{MANY}:broadcast_two", 180, 15, "broadcast between two processes"),
    Check("ranks-two", f"{MANY}:ranks_two", 300, 20, "FSDP2 with two ranks"),
    Check("vllm-engine", f"{SAMPLING}:vllm_engine", 420, 30, "vLLM starts; which runner; its log-probs"),
    Check("vllm-contract", f"{SAMPLING}:vllm_contract", 900, 60, "check_sampler on vLLM, sleep and wake among it"),
    Check("vllm-lora", f"{SAMPLING}:vllm_lora", 420, 45, "adapters"),
    Check("vllm-sleep", f"{SAMPLING}:vllm_sleep", 420, 45, "what sleep gives back"),
    Check("vllm-in-flight", f"{SAMPLING}:vllm_in_flight", 420, 45, "weights swapped under requests"),
    Check("vllm-run", f"{SAMPLING}:vllm_run", 600, 60, "a whole run with vLLM"),
    Check("rehearsal-8gb", f"{SAMPLING}:rehearsal_8gb", 900, 90, "the 8 GB recipe with 8 GiB free"),
)
