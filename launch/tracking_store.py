"""What launch/tracking does with a PostgreSQL database and with artifacts in gs://, through MLflow.

Run by the Python that has MLflow: `python launch/tracking_store.py VERB`, with a JSON object on standard
input: `database` and `artifacts` (URIs), `experiments` (ids; for `delete_artifacts` alone). It prints one
line of JSON.
"""

import json
import sys

import sqlalchemy
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry import sqlalchemy_store as registry  # noqa: F401 (its tables)
from mlflow.store.tracking import sqlalchemy_store as tracking  # noqa: F401 (its tables)

MIGRATIONS = "alembic_version"  # the table of the tool that MLflow makes its tables with


def mlflow_tables(engine):
    """Names of the tables of MLflow that a database has."""
    return sorted(set(sqlalchemy.inspect(engine).get_table_names()) & {*Base.metadata.tables, MIGRATIONS})


def describe(request):
    """Whether the database has no tables of MLflow yet, and nothing is at the artifacts' path."""
    engine = sqlalchemy.create_engine(request["database"])
    artifacts = get_artifact_repository(request["artifacts"])
    return {"database": not mlflow_tables(engine), "artifacts": not artifacts.list_artifacts()}


def experiments(request):
    """The ids of all experiments, deleted ones too."""
    engine = sqlalchemy.create_engine(request["database"])
    if "experiments" not in mlflow_tables(engine):
        return []
    with engine.connect() as connection:
        return [
            str(row[0])
            for row in connection.execute(sqlalchemy.text("SELECT experiment_id FROM experiments"))
        ]


def delete_artifacts(request):
    """Deletes the artifacts of experiments."""
    artifacts = get_artifact_repository(request["artifacts"])
    for experiment in request["experiments"]:
        artifacts.delete_artifacts(experiment)
    return {}


def delete_tables(request):
    """Drops MLflow's tables, and no others."""
    engine = sqlalchemy.create_engine(request["database"])
    Base.metadata.drop_all(engine)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP TABLE IF EXISTS {MIGRATIONS}"))
    return {}


VERBS = {f.__name__: f for f in (describe, experiments, delete_artifacts, delete_tables)}

if __name__ == "__main__":
    try:
        print(json.dumps(VERBS[sys.argv[1]](json.load(sys.stdin))))
    except Exception as error:  # the database's, the store's and the network's are many
        sys.exit(" ".join(str(error).split())[:300])
