//! Arrays of states, as the core reads them.

use numpy::{PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::{Element, Order, States};

/// Calls a method that is generic over the dtype of the states.
macro_rules! by_dtype {
    ($this:ident, $states:ident, $method:ident($($argument:expr),*)) => {{
        use numpy::{PyArrayDescrMethods, PyUntypedArrayMethods};

        let (dtype, py) = ($states.dtype(), $states.py());
        if dtype.is_equiv_to(&numpy::dtype::<f32>(py)) {
            $this.$method::<f32>($($argument),*)
        } else if dtype.is_equiv_to(&numpy::dtype::<u16>(py)) {
            $this.$method::<u16>($($argument),*)
        } else if dtype.is_equiv_to(&numpy::dtype::<half::f16>(py)) {
            $this.$method::<half::f16>($($argument),*)
        } else if dtype.is_equiv_to(&numpy::dtype::<f64>(py)) {
            $this.$method::<f64>($($argument),*)
        } else {
            Err($crate::python::errors::raised::StatesError::new_err(format!(
                "states of dtype {dtype}: expected float32, float16, bfloat16 (as uint16 bits) or \
                 float64"
            )))
        }
    }};
}

pub(super) use by_dtype;

/// A view of a C-contiguous array, (samples, L+1, D), or (L+1, samples, D).
pub(super) fn view<'a, T: Element + numpy::Element>(
    array: &'a PyReadonlyArray3<'_, T>,
    order: Order,
) -> PyResult<States<'a, T>> {
    let &[outer, inner, width] = array.shape() else {
        return Err(PyTypeError::new_err("states must have three axes"));
    };
    let (samples, num_states) = match order {
        Order::StateFirst => (inner, outer),
        Order::SampleFirst => (outer, inner),
    };
    Ok(States::new(
        array.as_slice()?,
        samples,
        num_states,
        width,
        order,
    )?)
}

/// A square matrix.
pub(super) fn square(
    py: Python<'_>,
    size: usize,
    values: Vec<f64>,
) -> PyResult<Bound<'_, numpy::PyArrayDyn<f64>>> {
    use numpy::PyArrayMethods;

    numpy::PyArray1::from_vec(py, values).reshape([size, size].as_slice())
}
