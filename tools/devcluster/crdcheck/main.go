// Validates CustomResourceDefinitions as the API server of one Kubernetes does when they are made: the schema, the rules
// and what they may cost. It is that server's own library, so that the oldest Kubernetes we name needs no server to test.
package main

import (
	"context"
	"fmt"
	"os"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
)

func main() {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder(apiextensions.SchemeGroupVersion)
	code := 0
	for _, file := range os.Args[1:] {
		text, err := os.ReadFile(file)
		if err == nil {
			crd := &apiextensions.CustomResourceDefinition{}
			if err = runtime.DecodeInto(decoder, text, crd); err == nil {
				err = validation.ValidateCustomResourceDefinition(context.Background(), crd).ToAggregate()
			}
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", file, err)
			code = 1
		}
	}
	os.Exit(code)
}
