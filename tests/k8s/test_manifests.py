"""The manifests: valid for Kubernetes and the operators' schemas, consistent, in step with the real command line."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tandem.cluster.options import ServeOptions
from tests.command_line import parse

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
SCHEMAS = ROOT.parent / "shared" / "crds"
CORE_GROUPS = ("v1", "apps/", "batch/", "policy/", "networking.k8s.io/", "autoscaling/", "rbac.authorization.k8s.io/")

Manifest = dict[str, Any]


def manifest_files() -> list[Path]:
    return sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def all_documents() -> list[Manifest]:
    return [document for path in manifest_files() for document in documents(path)]


def is_core(document: Manifest) -> bool:
    return document["apiVersion"].startswith(CORE_GROUPS)


def identify(document: Manifest) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


CORE = [document for document in all_documents() if is_core(document)]
CUSTOM = [document for document in all_documents() if not is_core(document)]


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema in which an unknown field is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    if schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    return result


def schema_errors(document: Manifest) -> list[str]:
    group, version = document["apiVersion"].split("/")
    stored = json.loads((SCHEMAS / f"{group}_{version}_{document['kind']}.json").read_text(encoding="utf-8"))
    schema = strict(stored["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason="the folder of CRD schemas, ../shared/crds, is absent")


@pytest.mark.parametrize("document", CORE, ids=identify)
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_core_kinds_are_valid(document: Manifest, version: str) -> None:
    assert kubernetes_validate.validate(document, version, strict=True) == version


def test_a_typo_in_a_core_kind_is_found() -> None:
    deployment = copy.deepcopy(next(item for item in CORE if identify(item) == "Deployment/tandem-router"))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessProb"):
        kubernetes_validate.validate(deployment, "1.37", strict=True)


@needs_schemas
@pytest.mark.parametrize("document", CUSTOM, ids=identify)
def test_custom_resources_are_valid(document: Manifest) -> None:
    assert schema_errors(document) == []


@needs_schemas
def test_a_typo_in_a_custom_resource_is_found() -> None:
    cluster = copy.deepcopy(ray_cluster())
    cluster["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert any("minReplica" in error for error in schema_errors(cluster))


def test_kustomization_lists_every_manifest() -> None:
    for folder in (K8S, K8S / "monitoring"):
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
        present = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert set(kustomization["resources"]) == present


def ray_cluster() -> Manifest:
    return next(document for document in CUSTOM if document["kind"] == "RayCluster")


def pod_templates() -> Iterator[tuple[str, Manifest]]:
    for document in CORE:
        if document["kind"] == "Deployment":
            yield identify(document), document["spec"]["template"]
    spec = ray_cluster()["spec"]
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


PODS = dict(pod_templates())


def test_each_worker_group_offers_its_own_role() -> None:
    groups = {group["groupName"]: group for group in ray_cluster()["spec"]["workerGroupSpecs"]}
    assert set(groups) == {"prefill", "decode"}
    for role, group in groups.items():
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {role: 1}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_head_runs_no_worker() -> None:
    assert ray_cluster()["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", PODS)
def test_containers_are_probed_bounded_and_unprivileged(name: str) -> None:
    pod = PODS[name]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["enableServiceLinks"] is False
    for container in pod["containers"]:
        assert "livenessProbe" in container
        assert "readinessProbe" in container or "startupProbe" in container
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_router_is_probed_where_it_answers() -> None:
    (router,) = PODS["Deployment/tandem-router"]["spec"]["containers"]
    assert router["startupProbe"]["httpGet"]["path"] == router["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert router["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert "preStop" in router["lifecycle"]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `tandem …` that a manifest, the Dockerfile or a probe runs."""
    for name, template in PODS.items():
        for container in template["spec"]["containers"]:
            lists = [container.get("command", []) + container.get("args", [])]
            lists += [container[probe].get("exec", {}).get("command", []) for probe in container if "Probe" in probe]
            for words in lists:
                text = " ".join(words) if "-c" in words else shlex.join(words)
                yield from ((name, shlex.split(found)[1:]) for found in re.findall(r"\btandem (?!-)[^&|;]+", text))
    line = re.search(r"^CMD (.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    yield "Dockerfile", json.loads(line[1])[1:]


COMMANDS = list(commands())


def test_commands_were_found() -> None:
    assert {(name, arguments[0]) for name, arguments in COMMANDS} >= {
        ("Deployment/tandem-router", "router"),
        ("Deployment/tandem-controller", "serve"),
        ("Deployment/tandem-controller", "status"),
        ("Dockerfile", "serve"),
    }


@pytest.mark.parametrize("arguments", [words for _, words in COMMANDS], ids=[" ".join(words) for _, words in COMMANDS])
def test_commands_are_what_the_command_line_takes(arguments: list[str]) -> None:
    parse(arguments)


def test_an_unknown_flag_is_found() -> None:
    with pytest.raises(Exception, match="No such option: --prefil"):
        parse(["serve", "--prefil", "2"])


def test_the_controller_asks_for_no_more_workers_than_the_groups_may_have() -> None:
    serve = next(words for name, words in COMMANDS if name == "Deployment/tandem-controller" and words[0] == "serve")
    wanted = parse(serve)
    assert set(wanted) >= {"prefill", "decode"} <= set(ServeOptions.__dataclass_fields__)
    for group in ray_cluster()["spec"]["workerGroupSpecs"]:
        assert group["replicas"] == wanted[group["groupName"]] <= group["maxReplicas"]


@pytest.mark.parametrize(("name", "flag"), [("router", "shutdown_timeout"), ("controller", "shutdown_timeout")])
def test_pods_are_given_the_time_that_their_streams_get(name: str, flag: str) -> None:
    deployment = f"Deployment/tandem-{name}"
    words = next(words for found, words in COMMANDS if found == deployment and words[0] in ("router", "serve"))
    assert parse(words)[flag] < PODS[deployment]["spec"]["terminationGracePeriodSeconds"]


def test_routers_expect_the_prefill_workers_that_the_controller_starts() -> None:
    router, serve = (next(words for _, words in COMMANDS if words[0] == role) for role in ("router", "serve"))
    assert parse(router)["prefill"] == parse(serve)["prefill"]


def test_services_and_policies_select_pods_that_exist() -> None:
    labels = [{**template["metadata"]["labels"], **ray_labels(name)} for name, template in PODS.items()]
    for document in CORE:
        selector = document.get("spec", {}).get("selector") or document.get("spec", {}).get("podSelector")
        if document["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            wanted = selector.get("matchLabels", selector if document["kind"] == "Service" else {})
            assert any(wanted.items() <= have.items() for have in labels), identify(document)


def ray_labels(name: str) -> dict[str, str]:
    """What KubeRay adds to its pods."""
    if name.startswith("Deployment/"):
        return {}
    return {"ray.io/cluster": ray_cluster()["metadata"]["name"], "ray.io/group": name}


def test_no_secret_is_in_the_repository() -> None:
    assert [identify(document) for document in all_documents() if document["kind"] == "Secret"] == []


def test_image_and_ray_versions_are_the_packages() -> None:
    import ray

    import tandem

    images = {container["image"] for pod in PODS.values() for container in pod["spec"]["containers"]}
    assert images - {"redis:7-alpine"} == {f"tandem:{tandem.__version__}"}
    assert ray_cluster()["spec"]["rayVersion"].split(".")[0] == ray.__version__.split(".")[0]
