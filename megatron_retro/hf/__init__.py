"""RETRO for Hugging Face's `transformers`: importing this registers `RetroForCausalLM` with its Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from megatron_retro.hf.configuration import RetroConfig
from megatron_retro.hf.modeling import RetroCache, RetroForCausalLM
from megatron_retro.hf.retriever import Retriever

__all__ = ["Retriever", "RetroCache", "RetroConfig", "RetroForCausalLM"]

AutoConfig.register(RetroConfig.model_type, RetroConfig)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM)
