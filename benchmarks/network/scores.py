"""The scores of models.scores, under the name by which the bench knows them.

Reads and writes nothing.
Never computes a score of its own.
"""

from models.scores import SCORES as SCORES
from models.scores import auc as auc
from models.scores import coverage as coverage
from models.scores import interval as interval
