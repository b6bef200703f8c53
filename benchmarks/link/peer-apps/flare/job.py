# mypy: ignore-errors
"""`job.py CLIENTS ROUNDS FOLDER`: write the FedAvg job that the bench submits."""

import sys

from model import Dummy
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat

recipe = FedAvgRecipe(
    name="flbench",
    min_clients=int(sys.argv[1]),
    num_rounds=int(sys.argv[2]),
    model=Dummy(),
    train_script="train.py",
    server_expected_format=ExchangeFormat.NUMPY,
)
recipe.export(sys.argv[3])
