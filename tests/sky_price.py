"""Run by SkyPilot's own Python (tests/test_sky_loader.py): loads task files with its loader, prices them, prints JSON.

    HOME=scratch .venv-launch/bin/python tests/sky_price.py CATALOG sky/*.yaml

FILE@GPUS prices a task with the GPUs that `sky launch --gpus` would choose.

Needs no network and no credentials: the clouds are enabled in SkyPilot's cache, the prices come from CATALOG.
"""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

# The repository's folder sky/ must not be taken for the package.
sys.path = [place for place in sys.path if Path(place or ".").resolve() != Path.cwd()]


def main(catalog: Path, files: list[str]) -> None:
    make_catalog(catalog, Path.home() / ".sky/catalogs/v8")
    import yaml
    from sky.clouds import CloudCapability

    import sky
    from sky import check, global_user_state, optimizer

    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds("default"), "default")
    global_user_state.set_enabled_clouds(["AWS", "Lambda"], CloudCapability.COMPUTE, "default")
    found = {}
    for file in files:
        path, _, gpus = file.partition("@")
        document = yaml.safe_load(Path(path).read_text())
        required = {name: "x" for name, value in document["envs"].items() if value is None}
        task = sky.Task.from_yaml_config(document, {**required, "IMAGE": "i"})
        if gpus:
            task.set_resources_override({"accelerators": gpus})
        with sky.Dag() as dag:
            dag.add(task)
        best = optimizer.Optimizer.optimize(dag, quiet=True).tasks[0].best_resources
        found[Path(file).stem] = {
            "cloud": str(best.cloud),
            "region": best.region,
            "instance_type": best.instance_type,
            "spot": best.use_spot,
            "usd_per_hour": best.get_cost(3600),
            "candidates": len(task.resources),
            "down": all(r.autostop_config.down for r in task.resources if r.autostop_config),
        }
    print(json.dumps(found))


def make_catalog(source: Path, target: Path) -> None:
    """SkyPilot's layout from our price snapshot: no .meta beside it, so it is never refreshed over the network."""
    accelerators: dict[str, set[str]] = {}
    for cloud, name in (("aws", "AWS"), ("lambda", "Lambda")):
        (target / cloud).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / cloud / "vms.csv", target / cloud / "vms.csv")
        with (source / cloud / "vms.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["AcceleratorName"]:
                    accelerators.setdefault(row["AcceleratorName"], set()).add(name)
    with (target / "aws/images.csv").open("w") as file:
        file.write("Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId\n")
    with (target / "aws/instance_quota_mapping.csv").open("w") as file:
        file.write("InstanceType,QuotaName,OnDemandInstanceCode,SpotInstanceCode\n")
    (target / "common").mkdir(exist_ok=True)
    with (target / "common/accelerators.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["AcceleratorName", "Clouds"])
        rows.writerows([name, str(sorted(clouds))] for name, clouds in sorted(accelerators.items()))


if __name__ == "__main__":
    os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    main(Path(sys.argv[1]), sys.argv[2:])
