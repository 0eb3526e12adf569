"""A whole pipeline in one ONNX file: the encoder by `to_onnx`, scikit-learn's steps behind it by skl2onnx.

    pip install onnx onnxscript onnxruntime skl2onnx
    python examples/onnx_pipeline.py

Trains on scikit-learn's digits, merges both parts, and compares the file's labels and probabilities with the
pipeline's. A few seconds.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx.compose import add_prefix, merge_models
from skl2onnx import to_onnx
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from skdim import DIMTransformer


def write_pipeline(pipeline: Pipeline, path: Path) -> None:
    """Write a fitted pipeline of a DIMTransformer and steps that skl2onnx knows."""
    dim, head = pipeline[0], pipeline[1:]
    dim.to_onnx(path)
    encoder = onnx.load(path)
    (embedding,) = encoder.graph.output
    # Both parts have to be of one version of the operators, and of the format.
    opset = next(each.version for each in encoder.opset_import if not each.domain)
    example = np.zeros((1, len(dim.get_feature_names_out())), dtype=np.float32)
    head = to_onnx(head, example, target_opset={"": opset, "ai.onnx.ml": 3}, options={"zipmap": False})
    head.ir_version = encoder.ir_version
    # Names have to differ; those of inputs and outputs are kept.
    head = add_prefix(head, "head_", rename_inputs=False, rename_outputs=False)
    (head_input,) = head.graph.input
    onnx.save(merge_models(encoder, head, io_map=[(embedding.name, head_input.name)]), path)


def main() -> None:
    X, y = load_digits(return_X_y=True)
    images = X.astype(np.float32).reshape(-1, 1, 8, 8)
    X_train, X_test, y_train, y_test = train_test_split(images, y, random_state=0)
    pipeline = make_pipeline(
        DIMTransformer(32, max_epochs=5, random_state=0), StandardScaler(), LogisticRegression(max_iter=500)
    )
    pipeline.fit(X_train, y_train)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.onnx")
        write_pipeline(pipeline, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        labels, probabilities = session.run(None, {"images": X_test})
        print(f"{path.name}, {path.stat().st_size / 1e6:.1f} MB")
    print(
        f"accuracy in scikit-learn {pipeline.score(X_test, y_test):.1%}, in onnxruntime {np.mean(labels == y_test):.1%}"
    )
    print(f"labels that differ: {np.sum(labels != pipeline.predict(X_test))} of {len(X_test)}")
    difference = abs(probabilities - pipeline.predict_proba(X_test)).max()
    print(f"probabilities differ by at most {difference:.0e}")


if __name__ == "__main__":
    main()
