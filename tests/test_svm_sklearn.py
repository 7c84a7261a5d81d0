"""bcd.svm inside scikit-learn: its checks, clones, pickles, pipelines, searches and metadata routing."""

import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import sklearn
import sklearn.svm as peers
from sklearn.base import clone, is_classifier, is_outlier_detector, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_iris, make_regression
from sklearn.ensemble import BaggingClassifier
from sklearn.exceptions import ConvergenceWarning, SkipTestWarning
from sklearn.feature_selection import RFE
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator

from bcd.svm import SVC, SVDD, SVR, NuSVC, NuSVR, OneClassSVM

MACHINES = (SVC, NuSVC, SVR, NuSVR, OneClassSVM, SVDD)
TIGHT = 1e-10

# The check compares to 1e-7, which needs a small tol: with it only this much is left.
WEIGHTS = ("check_sample_weight_equivalence_on_dense_data", "check_sample_weight_equivalence_on_sparse_data")
LOOSE = dict.fromkeys(WEIGHTS, "compared to 1e-7, and tol is 1e-3")
ON_THE_EDGE = dict.fromkeys(
    WEIGHTS, "decision values agree, but free support vectors lie on the boundary: their sign is rounding"
)
CLASS_WEIGHT = {"check_class_weight_classifiers": "nu = 0.5 is infeasible with class weights 1000 and 0.0001"}
INFEASIBLE = dict.fromkeys(WEIGHTS, "nu = 0.5 is infeasible with the weights of the check")

CASES = [
    (SVC(), LOOSE),
    (SVC(tol=TIGHT), {}),
    (SVC(tol=TIGHT, kernel="linear", break_ties=True), {}),
    (SVC(kernel="precomputed"), {}),
    (NuSVC(), CLASS_WEIGHT | INFEASIBLE),
    (SVR(), LOOSE),
    (SVR(tol=TIGHT), {}),
    (SVR(kernel="precomputed"), {}),
    (NuSVR(), LOOSE),
    (NuSVR(tol=TIGHT), {}),
    (OneClassSVM(), LOOSE),
    (OneClassSVM(tol=TIGHT), ON_THE_EDGE),
    (SVDD(), LOOSE),
    (SVDD(tol=TIGHT), ON_THE_EDGE),
]


def name_of(check):
    return check.func.__name__


CHECKS = [
    pytest.param(machine, check, id=f"{machine!r}-{name_of(check)}".replace("\n", ""))
    for machine, failing in CASES
    for _, check in estimator_checks_generator(machine)
    if name_of(check) not in failing
]


@pytest.mark.parametrize(("machine", "check"), CHECKS)
def test_checks_of_scikit_learn(machine, check):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SkipTestWarning)
        if machine.kernel == "precomputed" and name_of(check) == "check_positive_only_tag_during_fit":
            warnings.simplefilter("ignore", ConvergenceWarning)  # its matrix is not positive semidefinite
        try:
            check(clone(machine))
        except SkipTestWarning as skipped:
            pytest.skip(str(skipped))


@pytest.mark.parametrize("check_name", WEIGHTS)
def test_weights_are_repetitions_for_nu_svc(check_name):
    """With a nu that the weights of the check allow."""
    machine = NuSVC(nu=0.3, tol=TIGHT)
    (check,) = [check for _, check in estimator_checks_generator(machine) if name_of(check) == check_name]
    check(machine)


def test_every_failure_left_out_is_one_of_scikit_learn_s_own():
    """For its five machines it expects the same; SVDD is checked as OneClassSVM."""
    instances = pytest.importorskip("sklearn.utils._test_common.instance_generator")
    for machine, failing in CASES:
        peer = peers.OneClassSVM if isinstance(machine, SVDD) else getattr(peers, type(machine).__name__)
        assert set(failing) <= set(instances.PER_ESTIMATOR_XFAIL_CHECKS[peer]), machine


def problem(kind, n=80):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 4))
    if kind in (SVC, NuSVC):
        return X, np.array(["no", "yes"])[(X[:, 0] + 0.3 * rng.normal(size=n) > 0).astype(int)]
    return X, X[:, 0] + 0.1 * rng.normal(size=n)


@pytest.mark.parametrize("kind", MACHINES)
def test_kinds_and_tags(kind):
    machine = kind()
    assert is_classifier(machine) == (kind in (SVC, NuSVC))
    assert is_regressor(machine) == (kind in (SVR, NuSVR))
    assert is_outlier_detector(machine) == (kind in (OneClassSVM, SVDD))
    assert get_tags(machine).input_tags.sparse
    assert not get_tags(machine).input_tags.pairwise
    tags = get_tags(kind(kernel="precomputed"))
    assert tags.input_tags.pairwise
    assert not tags.input_tags.sparse


@pytest.mark.parametrize("kind", [SVC, NuSVC, SVR, NuSVR, OneClassSVM])
def test_parameters_and_defaults_are_those_of_scikit_learn(kind):
    mine, theirs = kind().get_params(), getattr(peers, kind.__name__)().get_params()
    assert {name: mine[name] for name in theirs} == theirs
    assert set(mine) - set(theirs) <= {"time_limit", "warm_start", "dtype", "device", "n_jobs"}


@pytest.mark.parametrize("kind", MACHINES)
@pytest.mark.parametrize("container", [np.asarray, sp.csr_array])
def test_pickles_predict_the_same(kind, container):
    X, y = problem(kind)
    machine = kind(warm_start=True).fit(container(X), y)
    again = pickle.loads(pickle.dumps(machine))
    np.testing.assert_array_equal(again.predict(container(X)), machine.predict(container(X)))
    assert again.status_ is machine.status_
    again.fit(container(X), y)
    assert np.max(again.n_iter_) <= np.max(machine.n_iter_)


@pytest.mark.parametrize("kind", MACHINES)
def test_clones_have_the_parameters_and_nothing_else(kind):
    X, y = problem(kind)
    machine = kind(tol=0.02, gamma=0.3, warm_start=True).fit(X, y)
    copy = clone(machine)
    assert copy.get_params() == machine.get_params()
    assert not [name for name in vars(copy) if name.endswith("_") or name == "_last_duals"]
    np.testing.assert_array_equal(copy.fit(X, y).predict(X), machine.predict(X))


def test_a_fit_forgets_the_one_before():
    X, y = load_iris(return_X_y=True)
    machine = SVC().fit(X, y)
    assert isinstance(machine.duality_gap_, np.ndarray)
    machine.fit(X[:100], y[:100])
    assert isinstance(machine.duality_gap_, float)
    assert machine.decision_function(X).shape == (150,)


@pytest.mark.parametrize("kind", [SVC, NuSVC, SVR, NuSVR])
def test_grid_search_in_a_pipeline(kind):
    X, y = problem(kind)
    pipeline = make_pipeline(StandardScaler(), kind())
    name = kind.__name__.lower()
    grid = {f"{name}__gamma": [0.01, 0.1, 1.0], f"{name}__kernel": ["rbf", "linear"]}
    search = GridSearchCV(pipeline, grid, cv=3).fit(X, y)
    assert search.best_score_ > 0.8
    assert search.predict(X).shape == (80,)


def test_grid_search_takes_the_choices_of_scikit_learn():
    X, y = problem(SVC)
    grid = {"C": [0.1, 1, 10], "gamma": [0.01, 0.1, 1], "class_weight": [None, "balanced"]}
    ours, theirs = (GridSearchCV(m, grid, cv=4).fit(X, y) for m in (SVC(tol=1e-6), peers.SVC(tol=1e-6)))
    np.testing.assert_allclose(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"])
    assert ours.best_params_ == theirs.best_params_


def test_precomputed_kernels_are_cut_both_ways_in_cross_validation():
    X, y = problem(SVC)
    by_matrix = cross_val_predict(SVC(kernel="precomputed"), X @ X.T, y, cv=4, method="decision_function")
    by_rows = cross_val_predict(SVC(kernel="linear"), X, y, cv=4, method="decision_function")
    np.testing.assert_allclose(by_matrix, by_rows, atol=5e-3)


@pytest.mark.parametrize("kind", MACHINES)
def test_metadata_routing_of_sample_weight(kind):
    X, y = problem(kind)
    parameters = {"gamma": 0.3} | ({"C": 0.05} if kind is SVDD else {})  # a C of 1 bounds nothing
    weight = np.random.default_rng(1).uniform(0.5, 2, len(y))
    with sklearn.config_context(enable_metadata_routing=True):
        machine = kind(**parameters).set_fit_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), machine)
        pipeline.fit(X, y, sample_weight=weight)
    direct = kind(**parameters).fit(StandardScaler().fit_transform(X), y, sample_weight=weight)
    np.testing.assert_array_equal(pipeline[-1].dual_coef_, direct.dual_coef_)
    unweighted = kind(**parameters).fit(StandardScaler().fit_transform(X), y)
    assert not np.array_equal(direct.intercept_, unweighted.intercept_)


def test_metadata_routing_in_cross_validation():
    X, y = problem(SVC)
    weight = (np.arange(80) % 4 > 0).astype(float)
    with sklearn.config_context(enable_metadata_routing=True):
        machine = SVC().set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        result = cross_validate(machine, X, y, cv=3, params={"sample_weight": weight}, return_estimator=True)
    for fitted in result["estimator"]:
        assert len(fitted.support_) < 54
    assert np.mean(result["test_score"]) > 0.7


def test_calibration_gives_probabilities():
    X, y = load_iris(return_X_y=True)
    chance = CalibratedClassifierCV(SVC(), ensemble=False).fit(X, y).predict_proba(X)
    assert chance.shape == (150, 3)
    np.testing.assert_allclose(chance.sum(axis=1), 1)
    assert (chance.argmax(axis=1) == y).mean() > 0.9


def test_inside_other_meta_estimators():
    X, y = load_iris(return_X_y=True)
    assert OneVsRestClassifier(SVC()).fit(X, y).score(X, y) > 0.9
    assert BaggingClassifier(SVC(), n_estimators=3, random_state=0).fit(X, y).score(X, y) > 0.9
    assert RFE(SVC(kernel="linear"), n_features_to_select=2).fit(X, y).support_.sum() == 2
    A, B = make_regression(60, 4, n_targets=2, random_state=0)
    assert MultiOutputRegressor(SVR(kernel="linear", C=100)).fit(A, B).score(A, B) > 0.9


def test_outlier_detectors_fit_predict():
    X, _ = problem(OneClassSVM)
    for machine in (OneClassSVM(nu=0.2), SVDD(C=1 / 16)):
        labels = machine.fit_predict(X)
        assert set(labels) == {-1, 1}
        assert 0.05 < (labels == -1).mean() <= 0.35


def test_feature_names_are_kept():
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    X, y = problem(SVC)
    frame = pd.DataFrame(X, columns=list("abcd"))
    machine = SVC().fit(frame, y)
    assert machine.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        machine.predict(frame[list("dcba")])


@pytest.mark.parametrize("kind", MACHINES)
def test_read_only_input_is_left_alone(kind):
    X, y = problem(kind)
    before = X.copy()
    X.flags.writeable = False
    y.flags.writeable = False
    machine = kind().fit(X, y)
    machine.predict(X)
    np.testing.assert_array_equal(X, before)
    S = sp.csr_array(before)
    for part in (S.data, S.indices, S.indptr):
        part.flags.writeable = False
    kind().fit(S, y).predict(S)


def test_processes_give_the_same_model():
    """joblib's backend is the user's: loky, Dask, Ray."""
    from joblib import parallel_config

    X, y = load_iris(return_X_y=True)
    one = SVC().fit(X, y)
    with parallel_config(backend="loky"):
        other = SVC(n_jobs=2).fit(X, y)
    np.testing.assert_array_equal(one.dual_coef_, other.dual_coef_)
    np.testing.assert_array_equal(one.intercept_, other.intercept_)
