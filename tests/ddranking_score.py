"""The two halves of ddranking_check.sh: `export` runs where ddrepro is, `score` where ddranking is; only a file passes between them."""
import sys

import torch


def export(path: str):
    "A small set, distilled from digits as pictures with three channels, as DD-Ranking takes it, and the real pictures"
    from ddrepro.data import RealData, load_data
    from ddrepro.distill import distill
    from ddrepro.distill.hub import CIFAR_CONSTANTS
    from ddrepro.methods import get_method

    def pictures(part):
        x = part.inputs["image"]
        x = x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)
        return x.expand(-1, 3, -1, -1).contiguous()
    digits = load_data("digits")
    parts = {"train": digits.train, "test": digits.test.select(range(200))}
    bytes_of = {name: (pictures(part), part.labels) for name, part in parts.items()}
    (x, y), (x_test, y_test) = bytes_of["train"], bytes_of["test"]
    real = RealData.from_tensors("digits in three channels", {"image": x}, y, {"image": x_test}, y_test)
    method = get_method("dm", ipc=2, factor=2, width=16, iterations=60, batch=64)
    s = distill(method, real, progress=False)
    assert real.normalisation["image"] != CIFAR_CONSTANTS      # so that the constants are exchanged on the way
    metric, tensors = s.to_ddranking("CIFAR10")
    theirs = CIFAR_CONSTANTS(x_test)
    torch.save(dict(metric=metric, tensors=tensors, train=bytes_of["train"], test=bytes_of["test"], normalised=theirs), path)
    print(s, "→", {k: getattr(v, "shape", v) for k, v in tensors.items()})


def score(path: str):
    "What LabelRobustScoreHard makes of the tensors, with our pictures in the place of CIFAR-10"
    import torchvision.datasets
    from torchvision.transforms.functional import to_pil_image
    kept = torch.load(path, weights_only=True)

    class Pictures(torch.utils.data.Dataset):
        "What torchvision's CIFAR10 is to ddranking"

        def __init__(self, root, train, download, transform):
            pictures, labels = kept["train" if train else "test"]
            self.data, self.targets, self.transform = pictures, labels.tolist(), transform

        def __len__(self): return len(self.targets)

        def __getitem__(self, i): return self.transform(to_pil_image(self.data[i])), self.targets[i]

    torchvision.datasets.CIFAR10 = Pictures
    import ddranking.metrics
    from ddranking.metrics import LabelRobustScoreHard, hard_label

    hard_label.save_results = lambda results, path: None     # 0.2.0 appends each score twice and then cannot save them
    hard_label.REAL_DATA_ACC_CACHE["CIFAR10-ConvNet-3"] = 97.     # of a network trained on all these pictures, which it would ask for
    trained_on, accuracies = [], []
    inner = LabelRobustScoreHard._compute_hard_label_metrics

    def watched(self, model, image_tensor, image_path, lr, hard_labels, mode="real"):
        accuracy = inner(self, model, image_tensor, image_path, lr, hard_labels, mode)
        trained_on.append((image_tensor, hard_labels))
        accuracies.append(accuracy)
        return accuracy

    LabelRobustScoreHard._compute_hard_label_metrics = watched
    metric = LabelRobustScoreHard(**kept["metric"], num_eval=1, num_epochs=10, num_workers=0, device="cpu", data_aug_func=None, step_size=100,
                                  save_path="results/scores.csv", real_data_path=".")
    loaded = torch.stack([metric.test_loader_syn.dataset[i][0] for i in range(len(kept["normalised"]))])
    apart = (loaded - kept["normalised"]).abs().max().item()
    assert apart < 1e-5, f"DD-Ranking's test pictures are normalised otherwise than the set: {apart}"
    metric.compute_metrics(**kept["tensors"], **({} if "syn_lr" in kept["tensors"] else {"syn_lr": 0.01}))
    assert torch.equal(trained_on[0][0], kept["tensors"]["image_tensor"]) and torch.equal(trained_on[0][1], kept["tensors"]["hard_labels"])
    set_accuracy, random_accuracy = accuracies[0], max(accuracies[1:])
    scale = 100 if set_accuracy <= 1 else 1
    print(f"ddranking {ddranking.metrics.__name__}: set {scale * set_accuracy:.1f} %, as many random pictures {scale * random_accuracy:.1f} %")
    assert scale * set_accuracy > 40, "the exported set teaches little to DD-Ranking's networks"
    print("ddranking evaluates what ddrepro exports")


if __name__ == "__main__":
    {"export": export, "score": score}[sys.argv[1]](sys.argv[2])
