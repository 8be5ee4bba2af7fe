"""mtpdecode: a causal language model decodes several tokens per forward pass with its own MTP head, and the same law."""

from . import testing as testing
from .acceptance import Acceptance as Acceptance
from .acceptance import BlockAcceptance as BlockAcceptance
from .acceptance import StandardAcceptance as StandardAcceptance
from .assistant import Assistant as Assistant
from .assistant import AssistantProposer as AssistantProposer
from .cache import CropCache as CropCache
from .cache import KVCacheManager as KVCacheManager
from .cache import RaggedCache as RaggedCache
from .decoder import Chunk as Chunk
from .decoder import MTPDecoder as MTPDecoder
from .decoder import MTPOutput as MTPOutput
from .decoder import generate as generate
from .errors import CacheError as CacheError
from .errors import CheckpointError as CheckpointError
from .errors import GenerationError as GenerationError
from .errors import HeadWeightsError as HeadWeightsError
from .errors import MTPDecodeError as MTPDecodeError
from .errors import UnsupportedModelError as UnsupportedModelError
from .families import families as families
from .head import MTPHead as MTPHead
from .llm import LLM as LLM
from .llm import SamplingParams as SamplingParams
from .loading import save_head as save_head
from .metrics import Metrics as Metrics
from .presets import load as load
from .proposer import MixedProposer as MixedProposer
from .proposer import MTPProposer as MTPProposer
from .proposer import NGramProposer as NGramProposer
from .proposer import Proposer as Proposer
from .schedule import DraftSchedule as DraftSchedule
from .schedule import ExpectedSpeedup as ExpectedSpeedup
from .schedule import FixedLength as FixedLength
from .spec import MTPSpec as MTPSpec
from .state import Draft as Draft
from .verifier import Verifier as Verifier
from .vocabulary import DraftVocabulary as DraftVocabulary

__version__ = "0.1.0"
