"""The model: the learner's only door to transformers, peft and bitsandbytes. Finding it (``resolve.py``), loading it
(``loading.py``, ``nf4.py``, ``adapters.py``), its tensors and folder (``saving.py``), and what the sampler loads
(``for_sampler.py``)."""
