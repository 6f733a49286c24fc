//! Bytes of the prefix that a way to attend reads, per token, layer and KV head; and how many keys a number of bytes allows.
//!
//! Counted: K and V rows of every key that is attended to, sinks and window among them; centroids, variances or radii, offsets and
//! the lists of members; mean values with the estimate; page bounds or means; the K rows that a scan reads. Not counted: q, the
//! tail, the output, which are the same for all. The whole is K and V of the prefix: what dense attention reads of it.

use ggml_squeeze::attention::{Element, Spread};
use ggml_squeeze::index::{IndexMeta, LayerShape, LayerView, Members};

use super::Method;

/// Keys of a page of bounds (Quest), and of a page of means (as many as clusters of 5 % have on average).
pub const BOUNDS_PAGE: usize = 16;
pub const MEANS_PAGE: usize = 20;
/// Bytes of a key's or page's number in a list made online.
const NUMBER: f64 = 4.0;
/// Bytes of an F16 number.
const HALF: f64 = 2.0;

/// Sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    pub n_prefix: usize,
    pub n_sink: usize,
    pub n_window: usize,
    pub n_cluster: usize,
    pub head_dim_k: usize,
    pub head_dim_v: usize,
    /// Bytes of a row of K and of V.
    pub key: f64,
    pub value: f64,
    /// Bytes of a member's number.
    pub member: f64,
}

impl Layer {
    pub fn new(meta: &IndexMeta, view: &LayerView<'_>, types: [Element; 2]) -> Layer {
        let LayerShape { head_dim_k, head_dim_v, n_cluster, .. } = view.shape;
        Layer {
            n_prefix: meta.n_prefix(),
            n_sink: meta.n_sink as usize,
            n_window: meta.n_window as usize,
            n_cluster: n_cluster as usize,
            head_dim_k: head_dim_k as usize,
            head_dim_v: head_dim_v as usize,
            key: types[0].row_bytes(head_dim_k as usize) as f64,
            value: types[1].row_bytes(head_dim_v as usize) as f64,
            member: match view.members {
                Members::U16(_) => 2.0,
                Members::U32(_) => 4.0,
            },
        }
    }

    /// Keys that are clustered, or in pages.
    pub fn n_open(&self) -> usize {
        self.n_prefix - self.n_sink - self.n_window
    }

    /// What dense attention reads.
    pub fn dense(&self) -> f64 {
        self.n_prefix as f64 * (self.key + self.value)
    }

    /// Sinks and window, and what scoring needs whatever is kept.
    fn fixed(&self, method: Method) -> f64 {
        let (clusters, dk) = (self.n_cluster as f64, self.head_dim_k as f64);
        let pages = |of: usize| self.n_open().div_ceil(of) as f64;
        let scoring = match method {
            Method::Index { spread, estimate } => {
                let width = match spread {
                    Spread::None => 0.0,
                    Spread::Radius => 4.0,
                    Spread::Diag => dk + 4.0,
                };
                let means = if estimate { HALF * self.head_dim_v as f64 } else { 0.0 };
                clusters * (HALF * dk + NUMBER + width + means)
            }
            Method::BoundsHead | Method::Bounds => pages(BOUNDS_PAGE) * 2.0 * HALF * dk,
            Method::Means => pages(MEANS_PAGE) * HALF * dk,
            Method::Oracle | Method::Window | Method::Tokens(_) | Method::Recycled(_) => 0.0,
        };
        (self.n_sink + self.n_window) as f64 * (self.key + self.value) + scoring
    }

    /// One more key that is kept.
    fn per_key(&self, method: Method) -> f64 {
        let list = match method {
            Method::Index { .. } => self.member,
            Method::BoundsHead | Method::Bounds => NUMBER / BOUNDS_PAGE as f64,
            Method::Means => NUMBER / MEANS_PAGE as f64,
            Method::Window => 0.0,
            Method::Oracle | Method::Tokens(_) | Method::Recycled(_) => NUMBER,
        };
        self.key + self.value + list
    }

    /// Bytes read by a row that kept `keys`; `clusters` of the index are kept too, if it selects. `anchor`: it is one of the rows
    /// whose selection is used again by those after it.
    pub fn read(&self, method: Method, keys: usize, clusters: usize, anchor: bool) -> f64 {
        let (keys, open) = (keys as f64, self.n_open() as f64);
        let own = self.fixed(method) + keys * self.per_key(method);
        match method {
            // Mean values of kept clusters are not read.
            Method::Index { estimate: true, .. } => own - clusters as f64 * HALF * self.head_dim_v as f64,
            // All keys are scanned, so those that are kept have been read.
            Method::Tokens(_) if anchor => own + (open - keys) * self.key,
            // Dense, without a list.
            Method::Recycled(_) if anchor => self.dense(),
            _ => own,
        }
    }

    /// Clustered keys that a row which is no anchor may keep, so that rows read a share of the prefix's bytes on average; a
    /// share `anchors` of them are anchors.
    pub fn keys(&self, method: Method, share: f64, anchors: f64) -> usize {
        let (open, wanted) = (self.n_open() as f64, share * self.dense());
        let (fixed, per_key) = (self.fixed(method), self.per_key(method));
        let keys = match method {
            Method::Tokens(_) => {
                // anchors: fixed + keys * (per_key - key) + open * key
                (wanted - fixed - anchors * open * self.key) / (per_key - anchors * self.key)
            }
            Method::Recycled(_) if anchors >= 1.0 => open,
            Method::Recycled(_) => ((wanted - anchors * self.dense()) / (1.0 - anchors) - fixed) / per_key,
            // The mean values of kept clusters, which are as large as others, are saved.
            Method::Index { estimate: true, .. } => {
                let saved = self.n_cluster as f64 / open * HALF * self.head_dim_v as f64;
                (wanted - fixed) / (per_key - saved)
            }
            _ => (wanted - fixed) / per_key,
        };
        keys.round().clamp(0.0, open) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> Layer {
        Layer {
            n_prefix: 1116,
            n_sink: 16,
            n_window: 100,
            n_cluster: 50,
            head_dim_k: 64,
            head_dim_v: 64,
            key: 128.0,
            value: 128.0,
            member: 2.0,
        }
    }

    const DIAG: Method = Method::Index { spread: Spread::Diag, estimate: false };

    #[test]
    fn bytes_by_hand() {
        let l = layer();
        let always = 116.0 * 256.0;
        assert_eq!((l.n_open(), l.dense()), (1000, 1116.0 * 256.0));
        // 50 centroids of 64 F16, an offset, 64 bytes and a scale each; 200 keys with 2 bytes of list.
        assert_eq!(l.read(DIAG, 200, 9, false), always + 50.0 * (128.0 + 4.0 + 68.0) + 200.0 * 258.0);
        let plain = Method::Index { spread: Spread::None, estimate: false };
        assert_eq!(l.read(plain, 200, 9, false), always + 50.0 * 132.0 + 200.0 * 258.0);
        let radius = Method::Index { spread: Spread::Radius, estimate: false };
        assert_eq!(l.read(radius, 0, 0, false), always + 50.0 * 136.0);
        // Mean values of the 41 dropped clusters.
        let estimate = Method::Index { spread: Spread::None, estimate: true };
        assert_eq!(l.read(estimate, 200, 9, false), always + 50.0 * 132.0 + 41.0 * 128.0 + 200.0 * 258.0);
        // 63 pages of 16 with a minimum and a maximum; 50 pages of 20.
        assert_eq!(l.read(Method::Bounds, 32, 0, false), always + 63.0 * 256.0 + 32.0 * 256.25);
        assert_eq!(l.read(Method::BoundsHead, 32, 0, false), l.read(Method::Bounds, 32, 0, false));
        assert_eq!(l.read(Method::Means, 40, 0, false), always + 50.0 * 128.0 + 40.0 * 256.2);
        assert_eq!(l.read(Method::Window, 40, 0, false), always + 40.0 * 256.0);
        assert_eq!(l.read(Method::Oracle, 40, 0, false), always + 40.0 * 260.0);
        // A scan reads every K row, and V of what is kept.
        assert_eq!(l.read(Method::Tokens(8), 40, 0, true), always + 1000.0 * 128.0 + 40.0 * 132.0);
        assert_eq!(l.read(Method::Tokens(8), 40, 0, false), always + 40.0 * 260.0);
        assert_eq!(l.read(Method::Recycled(8), 1000, 0, true), l.dense());
    }

    #[test]
    fn the_keys_that_bytes_allow_read_those_bytes() {
        let l = layer();
        let estimate = Method::Index { spread: Spread::Diag, estimate: true };
        for share in [0.25, 0.33, 0.5] {
            for method in [DIAG, estimate, Method::Bounds, Method::Means, Method::Window, Method::Oracle] {
                let keys = l.keys(method, share, 0.0);
                // Clusters of 20 keys.
                let read = l.read(method, keys, keys / 20, false) / l.dense();
                assert!((read - share).abs() < 2e-3, "{method:?}: {read}, not {share}");
            }
            for method in [Method::Tokens(8), Method::Recycled(8)] {
                let keys = l.keys(method, share, 0.125);
                let anchor = l.read(method, if method == Method::Tokens(8) { keys } else { 1000 }, 0, true);
                let read = (anchor + 7.0 * l.read(method, keys, 0, false)) / 8.0 / l.dense();
                assert!((read - share).abs() < 2e-3, "{method:?}: {read}, not {share}");
            }
        }
        assert_eq!((l.keys(DIAG, 0.01, 0.0), l.keys(DIAG, 1.5, 0.0)), (0, 1000));
    }
}
