package telemetry

import (
	"crypto/x509"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
)

// settings are what the standard variables say of the exporter.
type settings struct {
	endpoint string
	headers  http.Header
	timeout  time.Duration
	gzip     bool
	roots    *x509.CertPool // nil: the system's
}

// readEnvironment returns nil when no export is asked for. The variables and
// their defaults are those of the OpenTelemetry specification, "OTLP Exporter
// Configuration"; one for traces takes precedence over the general one.
func readEnvironment(getenv func(string) string) (*settings, error) {
	get := func(name string) (value, variable string) {
		for _, prefix := range []string{"OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"} {
			if v := getenv(prefix + name); v != "" {
				return v, prefix + name
			}
		}
		return "", ""
	}
	endpoint, from := get("ENDPOINT")
	exporter := getenv("OTEL_TRACES_EXPORTER")
	switch {
	case strings.EqualFold(getenv("OTEL_SDK_DISABLED"), "true"), exporter == "none", exporter == "" && endpoint == "":
		return nil, nil // off: no error and no settings
	case exporter != "" && exporter != "otlp":
		return nil, badVariable("OTEL_TRACES_EXPORTER", exporter, `use "otlp" or "none"`)
	}
	s := &settings{endpoint: "http://localhost:4318/v1/traces", headers: http.Header{}, timeout: 10 * time.Second}
	if endpoint != "" {
		u, err := url.Parse(endpoint)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, badVariable(from, endpoint, "use a URL such as http://collector:4318")
		}
		if from == "OTEL_EXPORTER_OTLP_ENDPOINT" {
			u = u.JoinPath("v1", "traces")
		}
		s.endpoint = u.String()
	}
	if v, from := get("PROTOCOL"); strings.HasPrefix(v, "grpc") {
		return nil, badVariable(from, v, `use "http/json", usually at port 4318`)
	}
	if v, from := get("HEADERS"); v != "" {
		for pair := range strings.SplitSeq(v, ",") {
			k, val, ok := strings.Cut(pair, "=")
			val, err := url.PathUnescape(strings.TrimSpace(val))
			if !ok || err != nil || strings.TrimSpace(k) == "" {
				// The value may be a secret.
				return nil, badVariable(from, "…", "write name=value pairs, separated by commas")
			}
			s.headers.Set(strings.TrimSpace(k), val)
		}
	}
	if v, from := get("TIMEOUT"); v != "" {
		ms, err := strconv.Atoi(v)
		if err != nil || ms <= 0 {
			return nil, badVariable(from, v, "write a number of milliseconds")
		}
		s.timeout = time.Duration(ms) * time.Millisecond
	}
	switch v, from := get("COMPRESSION"); v {
	case "", "none":
	case "gzip":
		s.gzip = true
	default:
		return nil, badVariable(from, v, `use "gzip" or "none"`)
	}
	if v, from := get("CERTIFICATE"); v != "" {
		pem, err := os.ReadFile(v)
		s.roots = x509.NewCertPool()
		if err != nil || !s.roots.AppendCertsFromPEM(pem) {
			return nil, badVariable(from, v, "name a readable file of PEM certificates")
		}
	}
	if v, from := get("CLIENT_KEY"); v != "" {
		return nil, badVariable(from, v, "client certificates are not supported; use headers")
	}
	return s, nil
}

func badVariable(name, value, next string) error {
	return fault.New(fault.Invalid, "environment variable %s cannot be %q", name, value).
		WithNext("Unset it, or %s.", next)
}
