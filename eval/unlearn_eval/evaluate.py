from .evaluation import *  # noqa
from .evaluation import evaluate, run
