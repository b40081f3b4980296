package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestAs(t *testing.T) {
	cause := errors.New("cause")
	f := New(NotFound, "no image %q: %w", "x", cause).WithNext("Build it.")
	for _, tt := range []struct {
		err  error
		want Kind
	}{
		{fmt.Errorf("create workspace a: %w", f), NotFound},
		{fmt.Errorf("wait: %w", context.Canceled), Canceled},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), Timeout},
		{errors.Join(cause, f), NotFound},
		{cause, Internal},
	} {
		if got := As(tt.err); got.Kind != tt.want {
			t.Errorf("As(%v) is %s, want %s", tt.err, got.Kind, tt.want)
		}
		if !Is(tt.err, tt.want) {
			t.Errorf("Is(%v, %s) is false", tt.err, tt.want)
		}
	}
	if !errors.Is(f, cause) {
		t.Error("the cause is lost")
	}
	if Is(nil, Internal) {
		t.Error("nil is a fault")
	}
}

func TestEveryKindHasCodes(t *testing.T) {
	for k, c := range table {
		if c.HTTP < 400 || c.Connect == 0 || c.Exit == 0 {
			t.Errorf("%s has codes %+v", k, c)
		}
	}
	if Kind("unheard of").Codes() != Internal.Codes() {
		t.Error("an unknown kind is not internal")
	}
}
