package image

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// testRegistry is a registry on loopback; wrap may interfere with requests.
type testRegistry struct {
	host  string
	blobs atomic.Int32 // fetched
	mu    sync.Mutex
	wrap  func(next http.Handler, w http.ResponseWriter, r *http.Request)
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	r := &testRegistry{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			r.blobs.Add(1)
		}
		r.mu.Lock()
		wrap := r.wrap
		r.mu.Unlock()
		if wrap != nil {
			wrap(inner, w, req)
			return
		}
		inner.ServeHTTP(w, req)
	}))
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

func (r *testRegistry) interfere(f func(next http.Handler, w http.ResponseWriter, req *http.Request)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wrap = f
}

// pushTransport is the tests' own, so that its connections end with them.
func (r *testRegistry) push(t testing.TB, ref string, img partial.WithRawManifest) string {
	t.Helper()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	full := r.host + "/" + ref
	parsed, err := name.ParseReference(full)
	if err != nil {
		t.Fatal(err)
	}
	switch img := img.(type) {
	case v1.Image:
		err = remote.Write(parsed, img, remote.WithTransport(tr))
	case v1.ImageIndex:
		err = remote.WriteIndex(parsed, img, remote.WithTransport(tr))
	}
	if err != nil {
		t.Fatal(err)
	}
	r.blobs.Store(0)
	return full
}

func TestPull(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "team/app", ociSample(t))
	s := open(t, Options{})
	var seen sync.Map
	i, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref}, func(p domain.Progress) { seen.Store(p.Stage, p) })
	if err != nil {
		t.Fatal(err)
	}
	checkOCISample(t, i)
	if len(i.Names) != 1 || i.Names[0] != ref+":latest" {
		t.Errorf("names are %v", i.Names)
	}
	if !strings.Contains(i.Source, "team/app@sha256:") {
		t.Errorf("source is %s", i.Source)
	}
	if p, ok := seen.Load("downloading layers"); !ok || p.(domain.Progress).Done != p.(domain.Progress).Total || p.(domain.Progress).Total == 0 {
		t.Errorf("progress is %+v", p)
	}
	nothingLeft(t, s, i.Digest)

	// Again, under another name: nothing is fetched.
	r.blobs.Store(0)
	again, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref, Name: "mine"}, nil)
	if err != nil || again.Digest != i.Digest || r.blobs.Load() != 0 {
		t.Errorf("again: %s %v, %d blobs fetched", again.Digest, err, r.blobs.Load())
	}
	for _, n := range []string{"mine", ref, ref + ":latest"} {
		if got, err := s.Image(t.Context(), n); err != nil || got.Digest != i.Digest {
			t.Errorf("%s is %s (%v)", n, got.Digest, err)
		}
	}
}

func TestPullLayers(t *testing.T) {
	cases := []struct {
		name   string
		layers [][]tarEntry
		dirs   map[string]string // directory → names
		files  map[string]string
	}{
		{"whiteouts", [][]tarEntry{
			{{name: "a", body: "1"}, {name: "d/x", body: "1"}, {name: "d/y", body: "1"}, {name: "gone/deep/f", body: "1"}},
			{{name: "d/.wh.x"}, {name: ".wh.gone"}, {name: ".wh.never"}, {name: ".wh..wh.plnk/", mode: 0o700}},
		}, map[string]string{"/": "a d lost+found", "/d": "y"}, nil},
		{"gone and back", [][]tarEntry{
			{{name: "d/old", body: "1"}}, {{name: ".wh.d"}}, {{name: "d/new", body: "3"}},
		}, map[string]string{"/d": "new"}, nil},
		{"whiteout and new in one layer", [][]tarEntry{
			{{name: "d/old", body: "1"}}, {{name: ".wh.d"}, {name: "d/new", body: "2"}},
		}, map[string]string{"/d": "new"}, nil},
		{"opaque first", [][]tarEntry{
			{{name: "d/old", body: "1"}, {name: "d/sub/old", body: "1"}}, {{name: "d/"}, {name: "d/.wh..wh..opq"}, {name: "d/new", body: "2"}},
		}, map[string]string{"/d": "new"}, nil},
		{"opaque last", [][]tarEntry{
			{{name: "d/old", body: "1"}, {name: "d/sub/old", body: "1"}}, {{name: "d/new", body: "2"}, {name: "d/sub/new", body: "2"}, {name: "d/.wh..wh..opq"}},
		}, map[string]string{"/d": "new sub", "/d/sub": "new"}, nil},
		{"hard links across layers", [][]tarEntry{
			{{name: "a", body: "lower"}, {name: "b", kind: tar.TypeLink, link: "a"}},
			{{name: "c", kind: tar.TypeLink, link: "a"}, {name: "a", body: "upper"}, {name: "e", kind: tar.TypeLink, link: "a"}},
		}, nil, map[string]string{"a": "upper", "b": "lower", "c": "lower", "e": "upper"}},
		{"kinds change", [][]tarEntry{
			{{name: "f", body: "1"}, {name: "d/x", body: "1"}, {name: "l", kind: tar.TypeSymlink, link: "d"}},
			{{name: "f/"}, {name: "f/in", body: "2"}, {name: "d", body: "2"}, {name: "l", body: "2"}},
		}, map[string]string{"/f": "in"}, map[string]string{"d": "2", "l": "2"}},
		{"through a link of a lower layer", [][]tarEntry{
			{{name: "usr/lib/a", body: "1"}, {name: "lib", kind: tar.TypeSymlink, link: "usr/lib"}, {name: "abs", kind: tar.TypeSymlink, link: "/usr/lib"}},
			{{name: "lib/b", body: "2"}, {name: "abs/c", body: "2"}, {name: "lib/.wh.a"}},
		}, map[string]string{"/usr/lib": "b c"}, nil},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			r := newRegistry(t)
			img := empty.Image
			for _, l := range tc.layers {
				img = withLayers(t, img, makeTar(t, l...))
			}
			s := open(t, Options{})
			i, err := s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, "x", img)}, nil)
			if err != nil {
				t.Fatal(err)
			}
			fsck(t, i)
			for dir, want := range tc.dirs {
				if got := ls(t, i, dir); got != want {
					t.Errorf("%s holds %q, want %q", dir, got, want)
				}
			}
			for file, want := range tc.files {
				if got := debugfs(t, i, "cat /"+file); got != want {
					t.Errorf("%s reads %q, want %q", file, got, want)
				}
			}
		})
	}
}

func TestPullPicksPlatform(t *testing.T) {
	r := newRegistry(t)
	other := v1.Platform{OS: "linux", Architecture: "riscv64"}
	attestation := v1.Platform{OS: "unknown", Architecture: "unknown"}
	index := func(adds ...mutate.IndexAddendum) v1.ImageIndex { return mutate.AppendManifests(empty.Index, adds...) }
	foreign := mutate.IndexAddendum{Add: withLayers(t, empty.Image, makeTar(t, tarEntry{name: "foreign"})), Descriptor: v1.Descriptor{Platform: &other}}
	attest := mutate.IndexAddendum{Add: withLayers(t, empty.Image, makeTar(t, tarEntry{name: "attest"})), Descriptor: v1.Descriptor{Platform: &attestation}}
	ours := mutate.IndexAddendum{Add: ociSample(t), Descriptor: v1.Descriptor{Platform: &platform}}
	s := open(t, Options{})

	for name, ix := range map[string]v1.ImageIndex{
		"flat":   index(foreign, attest, ours),
		"nested": index(foreign, mutate.IndexAddendum{Add: index(attest, ours)}),
	} {
		i, err := s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, name, ix)}, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		checkOCISample(t, i)
	}
	_, err := s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, "none", index(foreign, attest))}, nil)
	wantFault(t, err, fault.NotFound, "no variant for "+platform.String(), "linux/riscv64")
	single, err := mutate.ConfigFile(ociSample(t), mustConfig(t, ociSample(t), func(c *v1.ConfigFile) { c.Architecture = "arm64" }))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, "single", single)}, nil)
	wantFault(t, err, fault.NotFound, "linux/arm64")
}

func TestPullRefuses(t *testing.T) {
	r := newRegistry(t)
	artifact := mutate.ConfigMediaType(ociSample(t), "application/vnd.cncf.helm.config.v1+json")
	oddLayer, err := mutate.Append(empty.Image, mutate.Addendum{Layer: staticLayer{t, makeTar(t)}, MediaType: "application/x-odd"})
	if err != nil {
		t.Fatal(err)
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for _, tc := range []struct {
		name string
		ref  string
		kind fault.Kind
		says string
	}{
		{"no image", r.host + "/nothing:here", fault.NotFound, "no such image"},
		{"bad reference", "UPPER CASE", fault.Invalid, "not an image reference"},
		{"not a container", r.push(t, "chart", artifact), fault.Invalid, "helm"},
		{"odd layer", r.push(t, "odd", oddLayer), fault.Unsupported, "application/x-odd"},
		{"hostile layer", r.push(t, "evil", withLayers(t, empty.Image, makeTar(t, tarEntry{name: "../../etc/cron.d/x", body: "x"}))), fault.Invalid, "leads out"},
		{"no registry", closed.Addr().String() + "/x", fault.Unavailable, "cannot be reached"},
		{"plain HTTP abroad", "192.168.255.1:1/x", fault.Invalid, "unencrypted"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, Options{Transport: &onlyLoopback{&http.Transport{}}})
			_, err := s.Pull(t.Context(), domain.PullOptions{Reference: tc.ref}, nil)
			wantFault(t, err, tc.kind, tc.says)
			nothingLeft(t, s)
		})
	}
}

// onlyLoopback keeps tests from the network: other hosts are unreachable.
type onlyLoopback struct{ *http.Transport }

func (o *onlyLoopback) RoundTrip(r *http.Request) (*http.Response, error) {
	if !isLoopback(r.URL.Hostname()) {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: net.UnknownNetworkError(r.URL.Scheme)}
	}
	return o.Transport.RoundTrip(r)
}

type staticLayer struct {
	t testing.TB
	b []byte
}

func (l staticLayer) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(l.b))
	return h, err
}
func (l staticLayer) DiffID() (v1.Hash, error) { return l.Digest() }
func (l staticLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.b)), nil
}
func (l staticLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }
func (l staticLayer) Size() (int64, error)                 { return int64(len(l.b)), nil }
func (l staticLayer) MediaType() (types.MediaType, error)  { return "application/x-odd", nil }

func TestGuardAgainstPlainHTTP(t *testing.T) {
	for _, tc := range []struct {
		registry string
		insecure bool
		url      string
		allowed  bool
	}{
		{"127.0.0.1:5000", false, "http://127.0.0.1:5000/v2/", true},
		{"localhost:5000", false, "http://localhost:5000/v2/", true},
		{"[::1]:5000", false, "http://[::1]:5000/v2/", true},
		{"127.0.0.1:5000", false, "http://10.0.0.1/token", false},
		{"registry.test", false, "https://registry.test/v2/", true},
		{"registry.test", false, "http://registry.test/v2/", false},
		{"registry.test", false, "http://127.0.0.1:8080/admin", false},
		{"10.0.0.1:5000", false, "http://10.0.0.1:5000/v2/", false},
		{"box.local:5000", false, "http://box.local:5000/v2/", false},
		{"10.0.0.1:5000", true, "http://10.0.0.1:5000/v2/", true},
	} {
		reached := false
		g := &guard{next: roundTrip(func(*http.Request) (*http.Response, error) { reached = true; return nil, io.EOF }),
			insecure: tc.insecure, loopback: isLoopback(hostOf(tc.registry))}
		req, err := http.NewRequest(http.MethodGet, tc.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		g.RoundTrip(req)
		if reached != tc.allowed {
			t.Errorf("registry %s, insecure %t, %s: sent %t, want %t", tc.registry, tc.insecure, tc.url, reached, tc.allowed)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestPullAuth(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "private", ociSample(t))
	r.interfere(func(next http.Handler, w http.ResponseWriter, req *http.Request) {
		if u, p, ok := req.BasicAuth(); !ok || u != "me" || p != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, req)
	})
	s := open(t, Options{})
	for _, auth := range []domain.RegistryAuth{{}, {Username: "me", Password: "wrong"}} {
		_, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref, Auth: auth}, nil)
		wantFault(t, err, fault.Unauthorized, "refuses access")
		if strings.Contains(err.Error(), "wrong") {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	if _, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref, Auth: domain.RegistryAuth{Username: "me", Password: "secret"}}, nil); err != nil {
		t.Error(err)
	}
}

// layerBlobs tells the sample's layers from its configuration.
func layerBlobs(t *testing.T, img v1.Image) map[string]bool {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]bool{}
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		m[h.String()] = true
	}
	return m
}

// cutter answers a layer's blob in full length but breaks off halfway.
func cutter(next http.Handler, w http.ResponseWriter, req *http.Request) {
	rec := httptest.NewRecorder()
	next.ServeHTTP(rec, req)
	b := rec.Body.Bytes()
	w.Header().Set("Content-Length", rec.Header().Get("Content-Length"))
	w.WriteHeader(rec.Code)
	w.Write(b[:len(b)/2])
	panic(http.ErrAbortHandler)
}

func TestPullRetries(t *testing.T) {
	r := newRegistry(t)
	img := ociSample(t)
	ref := r.push(t, "flaky", img)
	layers := layerBlobs(t, img)
	var mu sync.Mutex
	tries := map[string]int{}
	var limit int
	r.interfere(func(next http.Handler, w http.ResponseWriter, req *http.Request) {
		digest := req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]
		mu.Lock()
		tries[digest]++
		cut := layers[digest] && tries[digest] <= limit
		busy := strings.Contains(req.URL.Path, "/manifests/") && tries[digest] == 1
		mu.Unlock()
		switch {
		case busy:
			http.Error(w, "busy", http.StatusServiceUnavailable)
		case cut:
			cutter(next, w, req)
		default:
			next.ServeHTTP(w, req)
		}
	})
	limit = 2
	s := open(t, Options{})
	i, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref}, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkOCISample(t, i)

	mu.Lock()
	clear(tries)
	limit = 1000
	mu.Unlock()
	s = open(t, Options{})
	_, err = s.Pull(t.Context(), domain.PullOptions{Reference: ref}, nil)
	wantFault(t, err, fault.Unavailable, "broke off 4 times")
	nothingLeft(t, s)
}

func TestPullWrongContent(t *testing.T) {
	r := newRegistry(t)
	img := ociSample(t)
	ref := r.push(t, "x", img)
	layers := layerBlobs(t, img)
	r.interfere(func(next http.Handler, w http.ResponseWriter, req *http.Request) {
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, req)
		b := rec.Body.Bytes()
		if layers[req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]] && len(b) > 30 {
			b[30] ^= 1
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(b)
	})
	s := open(t, Options{})
	_, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref}, nil)
	wantFault(t, err, fault.Invalid, "digest")
	nothingLeft(t, s)
}

// TestPullWrongDiffID has layers that are what the manifest says, but not what
// the configuration says.
func TestPullWrongDiffID(t *testing.T) {
	r := newRegistry(t)
	img, err := mutate.ConfigFile(ociSample(t), mustConfig(t, ociSample(t), func(c *v1.ConfigFile) { c.RootFS.DiffIDs[1].Hex = strings.Repeat("0", 64) }))
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{})
	_, err = s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, "x", img)}, nil)
	wantFault(t, err, fault.Invalid, "layer 2 of 2", "digest")
	nothingLeft(t, s)
}

func TestPullTooLarge(t *testing.T) {
	r := newRegistry(t)
	bomb := withLayers(t, empty.Image, makeTar(t, tarEntry{name: "zeros", body: string(make([]byte, 8<<20))}))
	s := open(t, Options{MaxBytes: 1 << 20, MaxFiles: 1000})
	_, err := s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, "bomb", bomb)}, nil)
	wantFault(t, err, fault.Limit)
	nothingLeft(t, s)
}

func TestPullCancelled(t *testing.T) {
	r := newRegistry(t)
	img := ociSample(t)
	ref := r.push(t, "x", img)
	layers := layerBlobs(t, img)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.interfere(func(next http.Handler, w http.ResponseWriter, req *http.Request) {
		if layers[req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]] {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("x"))
			w.(http.Flusher).Flush()
			cancel()
			<-req.Context().Done() // stalls
			return
		}
		next.ServeHTTP(w, req)
	})
	s := open(t, Options{})
	_, err := s.Pull(ctx, domain.PullOptions{Reference: ref}, nil)
	wantFault(t, err, fault.Canceled)
	nothingLeft(t, s)
}

// TestPullTogether: eight callers, one transfer.
func TestPullTogether(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "x", ociSample(t))
	arrived := make(chan struct{}, 8)
	goOn := make(chan struct{})
	r.interfere(func(next http.Handler, w http.ResponseWriter, req *http.Request) {
		if strings.Contains(req.URL.Path, "/manifests/") {
			<-goOn
		}
		next.ServeHTTP(w, req)
	})
	s := open(t, Options{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			first := sync.OnceFunc(func() { arrived <- struct{}{} })
			if _, err := s.Pull(t.Context(), domain.PullOptions{Reference: ref}, func(domain.Progress) { first() }); err != nil {
				t.Error(err)
			}
		})
	}
	for range 8 {
		<-arrived
	}
	close(goOn)
	wg.Wait()
	if got := r.blobs.Load(); got != 3 { // two layers and the configuration
		t.Errorf("%d blobs fetched", got)
	}
}
