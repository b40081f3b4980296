package image

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// answerTimeout bounds the wait for the head of a registry's answer, and for
// each next piece of a layer.
const answerTimeout = time.Minute

func defaultTransport() http.RoundTripper {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       30 * time.Second,
		TLSHandshakeTimeout:   15 * time.Second,
		ResponseHeaderTimeout: answerTimeout,
	}
}

// parseReference reads a reference and the name that its image gets by
// default: the reference as it was written, with its tag.
func parseReference(o domain.PullOptions) (name.Reference, string, error) {
	opts := []name.Option{name.WeakValidation}
	if o.Insecure {
		opts = append(opts, name.Insecure)
	}
	ref, err := name.ParseReference(o.Reference, opts...)
	if err != nil {
		return nil, "", fault.New(fault.Invalid, "%q is not an image reference: %w", o.Reference, err).
			WithNext("Write it as [REGISTRY/]REPOSITORY[:TAG] or [REGISTRY/]REPOSITORY@sha256:DIGEST.")
	}
	given := o.Reference
	if t, ok := ref.(name.Tag); ok && !strings.HasSuffix(given, ":"+t.TagStr()) {
		given += ":" + t.TagStr()
	}
	return ref, given, nil
}

var errPlainHTTP = errors.New("the registry is to be reached by unencrypted HTTP")

// guard lets no request leave unencrypted unless the caller allowed it or both
// the registry and the request's target are this machine. The library would
// also try it with private addresses and names below .local.
type guard struct {
	next     http.RoundTripper
	insecure bool
	loopback bool // the registry is this machine
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !g.insecure && (!g.loopback || !isLoopback(req.URL.Hostname())) {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, errPlainHTTP
	}
	return g.next.RoundTrip(req)
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

func hostOf(registry string) string {
	if host, _, err := net.SplitHostPort(registry); err == nil {
		return host
	}
	return strings.Trim(registry, "[]")
}

// remoteOptions are those of every request for ref.
func (s *Store) remoteOptions(ctx context.Context, ref name.Reference, o domain.PullOptions) []remote.Option {
	return []remote.Option{
		remote.WithContext(ctx),
		remote.WithPlatform(platform),
		remote.WithTransport(&guard{s.o.Transport, o.Insecure, isLoopback(hostOf(ref.Context().RegistryStr()))}),
		remote.WithAuth(authn.FromConfig(authn.AuthConfig{
			Username:      o.Auth.Username,
			Password:      o.Auth.Password,
			IdentityToken: o.Auth.IdentityToken,
			RegistryToken: o.Auth.RegistryToken,
		})),
		remote.WithUserAgent("agentiso"),
		remote.WithRetryBackoff(remote.Backoff{Duration: s.pause / 2, Factor: 2, Jitter: 0.2, Steps: 4}),
	}
}

// resolveRemote fetches the manifest that ref means on this platform.
func (s *Store) resolveRemote(ctx context.Context, ref name.Reference, o domain.PullOptions) (v1.Image, error) {
	d, err := remote.Get(ref, s.remoteOptions(ctx, ref, o)...)
	if err != nil {
		return nil, err
	}
	if d.MediaType.IsIndex() {
		index, err := d.ImageIndex()
		if err != nil {
			return nil, err
		}
		return pickPlatform(index, ref.String(), nil)
	}
	if strings.Contains(string(d.MediaType), "manifest.v1+") {
		return nil, fault.New(fault.Unsupported, "%s is in Docker's old format (schema 1)", ref).
			WithNext("Push it again with a current tool, or use a newer tag.")
	}
	return d.Image()
}

// pickPlatform finds the guests' platform in an index; indexes may hold
// indexes. check, if not nil, is asked before a manifest is read.
func pickPlatform(index v1.ImageIndex, what string, check func(v1.Hash) error) (v1.Image, error) {
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	var have []string
	for _, d := range m.Manifests {
		if check != nil {
			if err := check(d.Digest); err != nil {
				return nil, err
			}
		}
		if d.MediaType.IsIndex() {
			inner, err := index.ImageIndex(d.Digest)
			if err != nil {
				return nil, err
			}
			if img, err := pickPlatform(inner, what, check); err == nil {
				return img, nil
			} else if !fault.Is(err, fault.NotFound) {
				return nil, err
			}
			continue
		}
		if !d.MediaType.IsImage() {
			continue
		}
		// A manifest that names no platform is looked into afterwards.
		if d.Platform == nil || d.Platform.OS == platform.OS && d.Platform.Architecture == platform.Architecture {
			return index.Image(d.Digest)
		}
		if d.Platform.OS != "unknown" { // attestations
			have = append(have, d.Platform.String())
		}
	}
	return nil, noPlatform(what, have)
}

func noPlatform(what string, have []string) error {
	return fault.New(fault.NotFound, "%s has no variant for %s, only for %s", what, platform.String(), cmp.Or(strings.Join(have, ", "), "nothing that runs")).
		WithNext("Use an image that is built for %s.", platform.String())
}

// explainRegistry turns what a registry or the way to it said into a fault.
func (s *Store) explainRegistry(ref name.Reference, err error) error {
	what := "pull " + ref.String()
	if _, ok := errors.AsType[*fault.Error](err); ok || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return s.explain(what, err)
	}
	registry := ref.Context().RegistryStr()
	if te, ok := errors.AsType[*transport.Error](err); ok {
		switch te.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			return fault.New(fault.Unauthorized, "%s: the registry %s refuses access: %w", what, registry, err).
				WithNext("Check the reference; a private image needs a login (`docker login %s` writes the credentials that agentiso reads).", registry)
		case http.StatusNotFound:
			return fault.New(fault.NotFound, "%s: the registry %s has no such image: %w", what, registry, err).
				WithNext("Check the repository and the tag.")
		case http.StatusTooManyRequests:
			return fault.New(fault.Unavailable, "%s: the registry %s allows no more requests for now: %w", what, registry, err).
				WithNext("Wait, or log in to the registry for a higher limit.")
		}
		return fault.New(fault.Unavailable, "%s: the registry %s answered with an error: %w", what, registry, err).
			WithNext("Try again later.")
	}
	switch {
	case errors.Is(err, errPlainHTTP):
		return fault.New(fault.Invalid, "%s: %w", what, err).
			WithNext("If you trust the network up to %s, pull with --insecure.", registry)
	case errors.Is(err, errDigest):
		return fault.New(fault.Invalid, "%s: %w", what, err).
			WithNext("Something between here and %s changes or damages data, or the image was pushed damaged.", registry)
	}
	if errors.Is(err, errTransfer) {
		return fault.New(fault.Unavailable, "%s: the transfer from %s broke off %d times: %w", what, registry, layerTries, err).
			WithNext("Try again when the network is better.")
	}
	// Not net.Error: an errno is one, a full disk's too.
	_, isURL := errors.AsType[*url.Error](err)
	if _, isNet := errors.AsType[*net.OpError](err); isURL || isNet {
		return fault.New(fault.Unavailable, "%s: the registry %s cannot be reached: %w", what, registry, err).
			WithNext("Check the name, the network and the proxy settings of the daemon (HTTPS_PROXY).")
	}
	return s.explain(what, err)
}

// errTransfer marks a transfer that another try may finish.
var errTransfer = errors.New("transfer broke off")
