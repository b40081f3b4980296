package config

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// envValue is a value of an environment variable: always text, which assign
// converts to what the key needs.
type envValue string

// assign converts v, a TOML value or an envValue, into the setting that field
// points to.
func assign(field, v any) error {
	env, fromEnv := v.(envValue)
	switch f := field.(type) {
	case *bool:
		if fromEnv {
			b, err := strconv.ParseBool(string(env))
			if err != nil {
				return wrong(v, "true or false")
			}
			v = b
		}
		b, ok := v.(bool)
		if !ok {
			return wrong(v, "true or false")
		}
		*f = b
	case *int, *int64:
		if fromEnv {
			n, err := strconv.ParseInt(string(env), 10, 64)
			if err != nil {
				return wrong(v, "a whole number")
			}
			v = n
		}
		n, ok := v.(int64)
		if !ok {
			return wrong(v, "a whole number")
		}
		if p, ok := f.(*int); ok {
			*p = int(n)
		} else {
			*f.(*int64) = n
		}
	case *[]netip.Addr:
		return assignList(f, v, netip.ParseAddr, `a list of addresses such as ["1.1.1.1"]`)
	case *[]netip.Prefix:
		return assignList(f, v, parsePrefix, `a list of networks such as ["10.0.0.0/8"]`)
	default:
		s, ok := v.(string)
		if fromEnv {
			s, ok = string(env), true
		}
		if !ok {
			return wrong(v, textKind(field))
		}
		return assignText(field, s)
	}
	return nil
}

// assignText converts one string.
func assignText(field any, s string) error {
	switch f := field.(type) {
	case *string:
		for _, r := range s {
			if r < ' ' || r == 0x7f {
				return fmt.Errorf("%q has a control character", s)
			}
		}
		*f = s
	case *time.Duration:
		d, err := time.ParseDuration(s)
		if err != nil {
			return fmt.Errorf("%q is not %s", s, textKind(field))
		}
		*f = d
	case *netip.Prefix:
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return fmt.Errorf("%q is not %s", s, textKind(field))
		}
		*f = p
	case *slog.Level:
		switch s {
		case "debug", "info", "warn", "error":
			return f.UnmarshalText([]byte(s))
		}
		return fmt.Errorf("%q is not one of debug, info, warn, error", s)
	default:
		panic(fmt.Sprintf("config: a key has type %T", field))
	}
	return nil
}

func textKind(field any) string {
	switch field.(type) {
	case *time.Duration:
		return `a duration such as "90s" or "2m"`
	case *netip.Prefix:
		return `a network such as "10.0.2.0/24"`
	}
	return "text in quotes"
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

func assignList[T any](field *[]T, v any, parse func(string) (T, error), want string) error {
	var items []any
	switch v := v.(type) {
	case envValue:
		for s := range strings.SplitSeq(string(v), ",") {
			items = append(items, strings.TrimSpace(s))
		}
	case []any:
		items = v
	default:
		return wrong(v, want)
	}
	list := make([]T, 0, len(items))
	for _, it := range items {
		s, ok := it.(string)
		if !ok {
			return wrong(v, want)
		}
		t, err := parse(s)
		if err != nil {
			return fmt.Errorf("%q does not belong in %s", s, want)
		}
		list = append(list, t)
	}
	*field = list
	return nil
}

func wrong(v any, want string) error {
	if s, ok := v.(envValue); ok {
		return fmt.Errorf("%q is not %s", string(s), want)
	}
	return fmt.Errorf("%s is not %s", describe(v), want)
}

// describe shows a TOML value of the wrong type.
func describe(v any) string {
	switch v := v.(type) {
	case string:
		return quote(v)
	case int64, float64, bool:
		return fmt.Sprint(v)
	case []any:
		return "a list"
	case map[string]any, []map[string]any:
		return "a table"
	case time.Time:
		return "a date"
	}
	return fmt.Sprintf("%T", v)
}

func deref(field any) any {
	switch f := field.(type) {
	case *bool:
		return *f
	case *int:
		return *f
	case *int64:
		return *f
	case *string:
		return *f
	case *time.Duration:
		return *f
	case *netip.Prefix:
		return *f
	case *[]netip.Addr:
		return *f
	case *[]netip.Prefix:
		return *f
	case *slog.Level:
		return *f
	}
	panic(fmt.Sprintf("config: a key has type %T", field))
}

// plain is a setting as JSON and TOML both know it: text, number, truth or a
// list of texts.
func plain(field any) any {
	switch v := deref(field).(type) {
	case time.Duration:
		return shortDuration(v)
	case netip.Prefix:
		return v.String()
	case slog.Level:
		return strings.ToLower(v.String())
	case []netip.Addr:
		return texts(v)
	case []netip.Prefix:
		return texts(v)
	default:
		return v
	}
}

func texts[T fmt.Stringer](list []T) []string {
	s := make([]string, len(list))
	for i, v := range list {
		s[i] = v.String()
	}
	return s
}

// shortDuration prints 1m30s as such and 1h0m0s as 1h.
func shortDuration(d time.Duration) string {
	s := d.String()
	for _, tail := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, tail) {
			s = s[:len(s)-2]
		}
	}
	return s
}

// literal writes a plain value in TOML.
func literal(v any) string {
	switch v := v.(type) {
	case string:
		return quote(v)
	case []string:
		q := make([]string, len(v))
		for i, s := range v {
			q[i] = quote(s)
		}
		return "[" + strings.Join(q, ", ") + "]"
	}
	return fmt.Sprint(v)
}

// quote writes a TOML basic string, whose escapes JSON shares. Control
// characters beyond JSON's do not get past assignText.
func quote(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s) // a string always encodes
	return strings.TrimSuffix(b.String(), "\n")
}
